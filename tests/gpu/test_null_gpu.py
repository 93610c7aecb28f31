"""Training and evaluation on GPU, up to the numbers: MindSpore's own GPU backend on a null GPU.

What this cannot show: results, times, memory (docs/gpu.md).
"""

import json
import os

import pytest
from conftest import ROOT, execute
from gpu.rig import NullGpu, missing

from src.models.blocks import BLOCKS
from src.models.networks import NETWORKS

DIGITS = ("--device_target=GPU", "--config_path=digits")
# The others have these networks' layers, and their graphs take minutes to compile.
QUICK = ("alexnet", "cifar_quick", "resnet18", "resnext50_32x4d")
whole_matrix = pytest.mark.skipif(
    not os.environ.get("GPU_MATRIX"), reason="takes minutes; GPU_MATRIX=1 runs it"
)


@pytest.fixture(scope="module")
def null_gpu(tmp_path_factory):
    if missing():
        pytest.skip(missing())
    return NullGpu(tmp_path_factory.mktemp("null_gpu"))


def assert_trains_and_evaluates(reports):
    for case, report in reports.items():
        assert "error" not in report, (case, report)
        assert not report["skipped"], case
        # In every precision, weights and statistics stay float32, and so do logits.
        assert report["logits"] == "float32" and report["parameters"] == ["Float32"], case


@pytest.mark.extended
def test_networks_train_and_evaluate(null_gpu):
    """Evaluation in O3 failed for each, and resnet18 in its first step."""
    reports = null_gpu.try_networks(
        "cifar_quick:O0",
        "cifar_quick+acb:O2",
        "resnet18:O3:stochastic_depth=0.2",
        "alexnet+repvgg:O3",
    )
    assert_trains_and_evaluates(reports)


@pytest.mark.extended
@pytest.mark.parametrize(
    "network", [n if n in QUICK else pytest.param(n, marks=whole_matrix) for n in NETWORKS]
)
def test_every_network_with_every_block_trains_and_evaluates(null_gpu, network):
    cases = [f"{network}+{block}:O3" for block in BLOCKS]
    assert_trains_and_evaluates(null_gpu.try_networks(f"{network}:O0", *cases))


@pytest.mark.parametrize(
    "optimizers",
    [
        pytest.param(["momentum"], marks=pytest.mark.slow),
        pytest.param(["adamw", "lars"], marks=pytest.mark.extended),
    ],
)
def test_a_step_asks_little_of_the_gpu(null_gpu, optimizers):
    """ResNeXt-50 had 2,025 launches, 646 copies on the GPU and 17 synchronisations per step."""
    bounds = {"momentum": (700, 5), "adamw": (725, 9), "lars": (780, 5)}
    cases = {name: f"resnext50_32x4d:O3:optimizer={name}" for name in optimizers}
    reports = null_gpu.try_networks(*cases.values())
    assert_trains_and_evaluates(reports)
    for name, case in cases.items():
        (launches, copies), report = bounds[name], reports[case]
        assert report["launches"] <= launches and report["D2D"] <= copies, report
        assert report["syncs"] <= 12 and report["H2D"] <= 30, report
        assert report["transposes"] <= 45 and report["casts"] <= 120, report


@pytest.mark.slow
def test_train_evaluate_resume_export(null_gpu, tmp_path):
    flags = (*DIGITS, "--run_eval=1", f"--output_path={tmp_path}")
    run = null_gpu.run("train.py", *flags, "--max_epoch=1")
    assert run.status == 0 and "TOP1" in run.out, run
    (folder,) = tmp_path.glob("*/ckpt_0")
    run = null_gpu.run("train.py", *flags, "--max_epoch=2", "--T_max=1", "--resume=auto")
    assert run.status == 0 and "epoch 2/2" in run.out, run
    run = null_gpu.run(
        "eval.py", "--data_path=digits", "--device_target=GPU", f"--checkpoint_file_path={folder}"
    )
    assert run.status == 0 and "355 images" in run.out, run
    run = null_gpu.run(
        "export.py",
        "--device_target=GPU",
        f"--checkpoint_file_path={folder}",
        f"--result_path={tmp_path}/network.ckpt",
    )
    assert run.status == 0 and (tmp_path / "network.ckpt").is_file(), run


@pytest.mark.slow
def test_the_classifier_alone_then_the_whole_network(null_gpu, trained_run, image_root, tmp_path):
    flags = (f"--data_path={image_root}/train", f"--pretrained={trained_run}/best.ckpt")
    run = null_gpu.run(
        "train.py",
        "--device_target=GPU",
        *flags,
        "--freeze_epochs=1",
        "--max_epoch=2",
        "--per_batch_size=16",
        "--run_eval=1",
        f"--output_path={tmp_path}",
    )
    assert run.status == 0 and "epoch 2/2" in run.out and run.out.count("TOP1") >= 2, run


@pytest.mark.slow
def test_overflow_in_every_step_is_counted_and_changes_nothing(null_gpu, tmp_path):
    run = null_gpu.run(
        "train.py", *DIGITS, "--max_steps=3", f"--output_path={tmp_path}", NULL_GPU_FINITE="0"
    )
    (metrics,) = tmp_path.glob("*/metrics.jsonl")
    assert run.status == 0 and json.loads(metrics.read_text())["skipped_steps"] == 3, run


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ["--decay_norm_and_bias=0", "--bias_lr_factor=2"],
        pytest.param(["--accumulation_steps=2"], marks=pytest.mark.extended),
    ],
)
def test_ranks_reduce_inside_the_graph(null_gpu, tmp_path, keys):
    """Once per step, for any number of groups: MindSpore fails with two AllReduces in a graph."""
    flags = (*DIGITS, "--run_distribute=1", "--run_eval=1", "--max_steps=4", *keys)
    run = null_gpu.run("train.py", *flags, f"--output_path={tmp_path}", ranks=2)
    assert run.status == 0 and "TOP1" in run.out, run
    assert run.out.count("'all_reduces': 4}") == 2, run


@pytest.mark.slow
def test_each_rank_may_see_one_gpu_only(null_gpu, tmp_path):
    """As under `srun --gpus-per-task=1`."""
    flags = (*DIGITS, "--run_distribute=1", "--max_steps=2", f"--output_path={tmp_path}/out")
    script = tmp_path / "one_each.py"
    script.write_text(
        "import os, sys\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = os.environ['OMPI_COMM_WORLD_LOCAL_RANK']\n"
        "os.execvp('python3', ['python3', *sys.argv[1:]])\n"
    )
    run = null_gpu.run("train.py", *flags, ranks=2, under=[script])
    assert run.status == 0 and run.out.count("'all_reduces': 2}") == 2, run


@pytest.mark.extended
def test_two_ranks_on_one_gpu_need_the_host_between_them(null_gpu, tmp_path):
    flags = (*DIGITS, "--run_distribute=1", "--max_steps=2", "--device_id=1")
    flags = (*flags, f"--output_path={tmp_path}")
    run = null_gpu.run("train.py", *flags, ranks=2)
    assert run.status == 2 and len(run.error_lines) == 1, run
    assert "ranks 0 and 1 would both compute on GPU 1" in run.error_lines[0]
    run = null_gpu.run("train.py", *flags, "--reducer=mpi", ranks=2)
    assert run.status == 0 and "'all_reduces': 0}" in run.out, run


@pytest.mark.slow
def test_more_ranks_than_gpus_are_refused(null_gpu, tmp_path):
    run = null_gpu.run(
        "train.py",
        *DIGITS,
        "--run_distribute=1",
        f"--output_path={tmp_path}",
        ranks=2,
        NULL_GPU_COUNT="1",
    )
    assert run.status == 2 and len(run.error_lines) == 1, run
    assert "both compute on GPU 0" in run.error_lines[0]


@pytest.mark.slow
def test_a_failure_of_nccl_is_named_with_a_way_out(null_gpu, tmp_path):
    flags = (*DIGITS, "--run_distribute=1", "--max_steps=2", f"--output_path={tmp_path}")
    run = null_gpu.run("train.py", *flags, ranks=2, NULL_GPU_NCCL="0")
    assert run.status == 2 and len(run.error_lines) == 1, run
    assert "NCCL cannot connect" in run.error_lines[0] and "--reducer=mpi" in run.error_lines[0]


@pytest.mark.extended
def test_a_newer_gpu_compiles_kernels_once_for_a_machine(null_gpu, tmp_path):
    """Compute capability 9: MindSpore's kernels and, for several ranks, NCCL's."""
    flags = (*DIGITS, "--max_steps=1", f"--output_path={tmp_path}")
    for ranks, whose in ((1, "libcuda_ops"), (1, None), (2, "libnccl"), (2, None)):
        distributed = ["--run_distribute=1"] if ranks > 1 else []
        run = null_gpu.run("train.py", *flags, *distributed, ranks=ranks, NULL_GPU_CAPABILITY="9.0")
        assert run.status == 0, run
        told = [line for line in run.err.splitlines() if "compiling them" in line]
        assert len(told) == (whose is not None), run
        assert whose is None or whose in told[0], run


@pytest.mark.extended
def test_the_benchmark_suite_runs_to_its_end(null_gpu, tmp_path):
    """A machine with a GPU is rare: the suite must not fail there for a reason seen here."""
    words = ["benchmarks/gpu_suite.py", "--networks=cifar_quick", "--batches=8", "--steps=2"]
    words += [f"--reference={tmp_path}/reference.json"]
    made = execute(["python3", *words, "--make_reference", "--device_target=CPU"])
    assert made.status == 0, made
    run = null_gpu.run(
        *words, "--image_size=32", GPU_SUITE_WRAPPER=str(ROOT / "tests/gpu/null_gpu.py")
    )
    lines = [json.loads(line) for line in run.out.splitlines() if line.startswith('{"part"')]
    assert run.status == 0 and not any("failed" in line for line in lines), run
    assert {line["part"] for line in lines} == {"agreement", "rates", "two_ranks", "digits"}


@pytest.mark.extended
def test_fit_batch_knows_the_gpus_memory(null_gpu, tmp_path):
    """AlexNet's weights take 1.2 GB and an image 4 MB; a process takes 0.7 GB without them."""
    flags = (*DIGITS, "--network=alexnet", "--image_size=224", "--block=base", "--dry_run=1")
    for gigabytes, batch in (("80", 64), ("3", 2)):
        run = null_gpu.run(
            "train.py",
            *flags,
            "--fit_batch=1",
            "--global_batch_size=64",
            f"--output_path={tmp_path}",
            NULL_GPU_MEMORY_GB=gigabytes,
        )
        assert run.status == 0 and f"steps of {batch} images" in run.out, run


def test_sync_bn_is_refused(null_gpu):
    run = null_gpu.run("train.py", *DIGITS, "--sync_bn=1")
    assert run.status == 2 and len(run.error_lines) == 1, run
    assert "sync_bn=1 needs device_target=Ascend" in run.error_lines[0]


@pytest.mark.extended
def test_deploy_and_predict(null_gpu, tmp_path):
    """Evaluation of the trained and the fused network; prediction from the trained one."""
    flags = ("--max_epoch=1", "--run_eval=1", "--deploy=1", f"--output_path={tmp_path}")
    run = null_gpu.run("train.py", *DIGITS, *flags)
    assert run.status == 0 and "difference: top1=0.00000" in run.out, run
    (folder,) = tmp_path.glob("*/ckpt_0")
    photo = next((ROOT / "data" / "digits" / "val" / "3").glob("*.png"))
    run = null_gpu.run(
        "predict.py", "--device_target=GPU", f"--checkpoint_file_path={folder}", photo
    )
    assert run.status == 0 and "10.0%" in run.out, run


@pytest.mark.extended
def test_images_that_grow(null_gpu, tmp_path):
    """Each size is another graph, with the same optimizer state."""
    flags = ("--network=wrn16_8_cifar", "--block=base", "--progressive_size=16", "--max_epoch=4")
    run = null_gpu.run("train.py", *DIGITS, *flags, "--run_eval=0", f"--output_path={tmp_path}")
    assert run.status == 0 and "training on 32-pixel images from epoch 4" in run.out, run
