"""Each benchmark runs and prints its line; the measured numbers are not asserted."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT, execute, write_image_folder
from mindspore import nn

from benchmarks.acnet_claims import pruned_top1
from src.models.create import create_model
from src.utils.errors import UserError


def test_train_step_prints_its_line():
    run = execute(
        [
            "python3",
            "benchmarks/train_step.py",
            "--network=cifar_quick",
            "--image_size=32",
            "--per_batch_size=4",
            "--steps=2",
        ]
    )
    assert run.status == 0, run
    assert re.fullmatch(
        r"train_step network=cifar_quick block=base ranks=1 per_batch_size=4 amp_level=O0 "
        r"kernels=[\w:]+ "
        r"images_per_second=[\d.]+ "
        r"forward_backward_s=[\d.]+ allreduce_s=[\d.]+ optimizer_s=[\d.]+ sent_mib=[\d.]+ "
        r"peak_rss_mib=\d+",
        run.out.strip(),
    ), run


@pytest.mark.extended
def test_acnet_study_prints_its_lines_and_figures(tmp_path):
    run = execute(
        [
            "python3",
            "benchmarks/acnet_study.py",
            "--seeds=1",
            "--epochs=1",
            "--networks=cifar_quick",
            f"--output={tmp_path}",
        ]
    )
    assert run.status == 0, run
    (line,) = [line for line in run.out.splitlines() if line.startswith("acnet_study ")]
    row = json.loads(line.partition(" ")[2])
    assert row["network"] == "cifar_quick" and row["fused_top1"] == pytest.approx(
        row["acb_top1"], abs=0.3
    )
    assert {file.name for file in tmp_path.iterdir()} == {"rotation.png", "skeleton.png"}


@pytest.mark.extended
def test_acnet_claims_turns_the_images_and_prunes_the_kernels(trained_run, image_root, tmp_path):
    run = execute(
        [
            "python3",
            "benchmarks/acnet_claims.py",
            f"--data_path={image_root}/val",
            f"--checkpoints={trained_run}/best.ckpt",
            "--ratios=0,0.3",
            "--seeds=2",
            f"--results={tmp_path}",
        ]
    )
    assert run.status == 0, run
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    metrics = [
        json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()
    ]
    best = max(line["top1"] for line in metrics)
    assert found["turned"]["0"] == pytest.approx(best, abs=0.01)
    assert list(found["turned"]) == ["0", "15", "30", "45", "90", "135", "180"]
    for by_ratio in found["pruned"].values():
        assert by_ratio["0"] == [found["turned"]["0"]] * 2


@pytest.mark.parametrize("position,allowed", [("skeleton", 9), ("corners", 16), ("all", 25)])
def test_acnet_claims_prunes_at_one_position_and_puts_back(position, allowed):
    conv = nn.Conv2d(4, 6, 5)
    before, seen = conv.weight.asnumpy().copy(), []
    network = nn.SequentialCell(conv)
    pruned_top1(network, position, 0.3, 0, lambda: seen.append(conv.weight.asnumpy().copy()))
    assert np.array_equal(conv.weight.asnumpy(), before)
    gone = (seen[0] == 0) & (before != 0)
    assert gone.sum() == round(0.3 * before.size)
    assert np.array_equal(seen[0][~gone], before[~gone])
    positions = np.flatnonzero(gone.any((0, 1)))
    middle = {2, 7, 12, 17, 22, 10, 11, 13, 14}
    assert len(positions) == allowed
    assert position == "all" or (set(positions) == middle) == (position == "skeleton")
    with pytest.raises(UserError, match="more than there are"):
        pruned_top1(network, position, 1.01, 0, lambda: None)


def test_old_figures_names_those_whose_code_has_changed(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return execute(["git", *identity, *words], cwd=tmp_path)

    for name, text in {
        "benchmarks/old_figures.py": (ROOT / "benchmarks" / "old_figures.py").read_text(),
        "src/training/step.py": "1",
        "src/cli/config.py": "1",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git("init")
    git("add", ".")
    assert git("commit", "-m", "first").status == 0
    commit = git("rev-parse", "--short", "HEAD").out.strip()
    (tmp_path / "docs").mkdir()
    table = "| a |\n| --- |\n| 1 |\n"
    (tmp_path / "docs" / "x.md").write_text(
        f"# Speed\n\nMeasured by benchmarks/a.py at commit {commit}.\n\n{table}\n"
        f"# Memory\n\nMeasured by benchmarks/b.py.\n\n{table}"
    )
    words = ["python3", tmp_path / "benchmarks" / "old_figures.py"]
    memory = "docs/x.md, 'Memory': a table that names no commit"
    assert execute(words).out.splitlines() == [memory]
    (tmp_path / "src/cli/config.py").write_text("2")
    git("commit", "-am", "the command line")
    assert execute(words).out.splitlines() == [memory]
    (tmp_path / "src/training/step.py").write_text("2")
    git("commit", "-am", "the step")
    old = f"docs/x.md, 'Speed': commit {commit}, changes since then: 1 in src/training"
    assert execute(words).out.splitlines() == [old, memory]


def test_checkpoint_cost_prints_its_line():
    run = execute(
        [
            "python3",
            "benchmarks/checkpoint_cost.py",
            "--network=cifar_quick",
            "--image_size=32",
            "--per_batch_size=4",
        ]
    )
    assert run.status == 0, run
    assert re.fullmatch(
        r"checkpoint_cost network=cifar_quick block=base mib=[\d.]+ save_s=[\d.]+ read_s=[\d.]+ "
        r"step_s=[\d.]+ "
        r"steps_between_saves_for_1_percent=\d+",
        run.out.strip(),
    ), run


@pytest.mark.extended
def test_repeatability_prints_a_line_a_number_of_ranks():
    run = execute(
        [
            "python3",
            "benchmarks/repeatability.py",
            "--steps=2",
            "--networks=cifar_quick",
            "--ranks=1,2",
        ]
    )
    assert run.status == 0, run
    found = re.findall(
        r"^repeatability network=cifar_quick ranks=(\d) steps=2 last_loss=[\d.]+ "
        r"largest_relative_difference=(\S+)$",
        run.out,
        re.M,
    )
    assert [ranks for ranks, _ in found] == ["1", "2"], run


@pytest.mark.extended
def test_soak_ends_with_the_same_bits(tmp_path):
    run = execute(
        ["python3", "benchmarks/soak.py", "--epochs=30", "--kills=1", f"--output={tmp_path}"]
    )
    assert run.status == 0 and re.search(
        r"^soak epochs=30 ranks=2 kills=1 .*bit_identical=True ", run.out, re.M
    ), run


@pytest.mark.extended
def test_gpu_suite_prints_its_lines(tmp_path):
    """On CPU, against a reference from another process: the same numbers."""
    words = ["python3", "benchmarks/gpu_suite.py", "--device_target=CPU", "--networks=cifar_quick"]
    words += [f"--reference={tmp_path}/reference.json", "--batches=4", "--steps=2"]
    run = execute([*words, "--make_reference"])
    assert run.status == 0, run
    run = execute([*words, "--image_size=32", "--parts=agreement,rates,two_ranks,digits"])
    assert run.status == 0, run
    lines = [json.loads(line) for line in run.out.splitlines()]
    agreement, ours, *_, two_ranks, digits = lines
    assert agreement["loss_difference"] == agreement["largest_gradient_norm_difference"] == 0
    assert agreement["largest_loss_difference_in_20_steps"] == 0
    assert ours["images_per_second"] > 0 and ours["peak_mib"] >= 0
    assert two_ranks["resumed"] and "TOP1" in digits["last_epoch"]


@pytest.mark.extended
def test_start_up_prints_a_line_with_the_cache_and_one_without():
    run = execute(["python3", "benchmarks/start_up.py", "--networks=cifar_quick:32", "--repeats=1"])
    assert run.status == 0, run
    for cached, line in enumerate(run.out.splitlines()):
        assert re.fullmatch(
            rf"start_up network=cifar_quick image_size=32 compile_cache={cached} "
            r"until_first_step_s=[\d.]+ "
            r"import_s=[\d.]+ data_s=[\d.]+ build_s=[\d.]+ compile_s=[\d.]+ "
            r"rest_of_first_step_s=[\d.]+ "
            r"later_step_s=[\d.]+",
            line,
        ), run


def test_allreduce_prints_its_line():
    run = execute(
        [
            "python3",
            "benchmarks/allreduce.py",
            "--networks=cifar_quick",
            "--ranks=2",
            "--repeats=2",
            "--mccl=0",
        ]
    )
    assert run.status == 0, run
    assert re.fullmatch(
        r"allreduce network=cifar_quick ranks=2 tensors=13 mib=[\d.]+ ours_s=[\d.]+ "
        r"raw_mpi_s=[\d.]+ of_raw_rate=[\d.]+",
        run.out.strip(),
    ), run


def test_input_pipeline_prints_its_lines():
    run = execute(
        [
            "python3",
            "benchmarks/input_pipeline.py",
            "--images=24",
            "--batch=8",
            "--rounds=1",
            "--pytorch=0",
        ]
    )
    assert run.status == 0, run
    train, evaluation, reading, operations, small = run.out.splitlines()
    assert re.fullmatch(
        r"input_pipeline reading_alone_images_per_second packed=\d+ mindrecord=\d+ files=\d+",
        reading,
    ), run
    for line, part in ((train, "train"), (evaluation, "eval")):
        assert re.fullmatch(
            rf"input_pipeline part={part} workers=2 batch=8 folder_images_per_second=\d+ "
            r"packed_256_images_per_second=\d+ mindspore_images_per_second=\d+",
            line,
        ), run
    assert "decode=" in operations and "normalise_s=" in operations
    assert re.fullmatch(
        r"input_pipeline part=small workers=2 first_epoch_images_per_second=\d+ "
        r"second_epoch_images_per_second=\d+",
        small,
    ), run


@pytest.mark.extended
def test_compare_pytorch_prints_its_line():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    run = execute(
        [
            "python3",
            "benchmarks/compare_pytorch.py",
            "--cases=cifar_quick+acb:4",
            "--image_size=32",
            "--steps=1",
            "--rounds=1",
        ]
    )
    assert run.status == 0, run
    assert re.search(
        r"^compare_pytorch mode=train precision=float32 network=cifar_quick block=acb ranks=\d "
        r"per_batch_size=4 "
        r"images_per_second=[\d.]+ pytorch_images_per_second=[\d.]+ pytorch_layout=\w+ "
        r"ratio=[\d.]+",
        run.out,
        re.M,
    ), run


@pytest.mark.parametrize("block", ["base", "acb"])
@pytest.mark.parametrize(
    "network", ["cifar_quick", "vgg16_cifar", "resnet56_cifar", "wrn16_8_cifar"]
)
def test_networks_that_are_timed_have_as_many_parameters_in_pytorch(network, block):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.pytorch_cifar import build_cifar

    theirs = sum(parameter.numel() for parameter in build_cifar(network, block).parameters())
    ours = create_model(network, 10, block).trainable_params()
    assert theirs == sum(parameter.size for parameter in ours)


@pytest.mark.extended
def test_compare_cifar_prints_its_line(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    write_image_folder(tmp_path, "train", [f"c{label}" for label in range(10)], 26, (32, 32))
    run = execute(
        [
            "python3",
            "benchmarks/compare_cifar.py",
            f"--data_path={tmp_path}",
            "--networks=cifar_quick",
            "--blocks=base",
            "--rounds=1",
            "--packed=1",
        ]
    )
    assert run.status == 0, run
    assert re.search(
        r"^compare_cifar network=cifar_quick block=base packed=1 ranks=\d "
        r"images_per_second=[\d.]+ pytorch_ranks=\d pytorch_layout=\w+ "
        r"pytorch_images_per_second=[\d.]+ ratio=[\d.]+$",
        run.out,
        re.M,
    ), run


@pytest.mark.extended
def test_kernels_prints_a_line_a_layer():
    run = execute(
        [
            "python3",
            "benchmarks/kernels.py",
            "--network=cifar_quick",
            "--image_size=32",
            "--per_batch_size=4",
            "--steps=1",
        ]
    )
    assert run.status == 0, run
    assert re.search(
        r"^kernels kind=convolution pass=weight_gradient shape=mb4_ic32oc32_\S+ per_step=1 "
        r"ms=[\d.]+ gflops=\d+ "
        r"implementation=(jit|brg)\S+$",
        run.out,
        re.M,
    ), run


@pytest.mark.extended
def test_gradient_compression_prints_a_line_a_form():
    run = execute(
        ["python3", "benchmarks/gradient_compression.py", "--epochs=1", "--cases=float16:1"]
    )
    assert run.status == 0, run
    assert re.fullmatch(
        r"gradient_compression form=float16 seed=1 ranks=2 epochs=1 first_difference=\S+ "
        r"largest_difference=\S+ "
        r"last_loss=[\d.]+ top1=[\d.]+",
        run.out.strip(),
    ), run


@pytest.mark.extended
def test_acb_cost_prints_its_lines():
    run = execute(
        [
            "python3",
            "benchmarks/acb_cost.py",
            "--networks=cifar_quick",
            "--batch=4",
            "--image_size=32",
            "--steps=1",
            "--rounds=1",
            "--pytorch=0",
        ]
    )
    assert run.status == 0, run
    assert re.findall(
        r"^acb_cost mode=(\w+) (?:engine=(\w+) )?network=cifar_quick "
        r".*(?:cost|fused_over_base)=[\d.]+$",
        run.out,
        re.M,
    ) == [("train", ""), ("eval", "mindspore"), ("eval", "onnx")], run


def test_scaling_model_reproduces_the_ring_that_alexnets_rows_imply():
    run = execute(["python3", "benchmarks/scaling_model.py"])
    # 2048 images / 20,000 images/s - 256 / 8,500 = 72.3 ms for 7/4 of 244.4 MB
    assert (
        run.status == 0
        and "left_for_reduction_s=0.0723 which_is_a_ring_of_gb_per_second=5.9" in run.out
    ), run


@pytest.mark.extended
def test_acnet_table_keeps_its_results(tmp_path):
    """With the digits instead of CIFAR-10. A second start trains nothing."""
    for part, name in (("train", "train"), ("val", "test")):
        (tmp_path / name).symlink_to(ROOT / "data" / "digits" / part)
    words = ["python3", "benchmarks/acnet_table.py", f"--data_path={tmp_path}", "--epochs=1"]
    words += ["--blocks=acb", "--seeds=1", "--amp_level=O0", f"--runs={tmp_path}/runs"]
    words += [f"--results={tmp_path}/results"]
    first, second = execute(words), execute(words)
    assert first.status == second.status == 0, (first, second)
    assert "epoch 1/1" in first.out and "epoch 1/1" not in second.out
    assert first.out.splitlines()[-1] == second.out.splitlines()[-1]
    (file,) = (tmp_path / "results").iterdir()
    result = json.loads(file.read_text())
    assert result["top1"] == result["fused_top1"] and result["recipe_epochs"] == 150
    (kernels,) = result["kernel_magnitudes"].values()
    assert len(kernels) == 5 and kernels[2][2] == max(map(max, kernels))
    assert f"| cifar_quick | acb | 1 |  | {result['top1']:.2f} |" in first.out


@pytest.mark.extended
def test_pytorch_training_continues_and_keeps_its_result(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is an optional extra")
    for part, images in (("train", 26), ("test", 2)):
        write_image_folder(tmp_path, part, [f"c{label}" for label in range(10)], images, (32, 32))
    words = [
        "python3",
        "benchmarks/pytorch_training.py",
        f"--data_path={tmp_path}",
        f"--runs={tmp_path}/runs",
        f"--results={tmp_path}/results",
        "--epochs=2",
    ]
    run = execute(words)
    assert run.status == 0 and "pytorch_training epoch=2 {'loss'" in run.out, run
    (file,) = (tmp_path / "results").iterdir()
    result = json.loads(file.read_text())
    assert result["top1"] >= 0 and result["epochs"] == 2 and result["framework"][:7] == "PyTorch"
    # The finished run has nothing left to train.
    run = execute(words)
    assert run.status == 0 and "epoch=" not in run.out, run
    assert json.loads(file.read_text()) == result
