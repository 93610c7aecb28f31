"""The seeds' command lines as their read-me files have them.

The hyper-parameters that they resolve to, and what running them shows.

docs/seeds.md lists which test runs which line. Only paths are replaced, and flags added behind that
make a run small and put it on CPU.
"""

import os
import re
import shlex

import numpy as np
import pytest
import yaml
from conftest import ROOT, execute, only_run, randomise

from src.cli.flags import parse_flags
from src.cli.recipes import load_config
from src.models.create import create_model
from src.models.networks import acnet_name
from src.models.weight_files import read_weights

ALEXNET = (
    "python /path/to/launch.py --nproc_per_node=8 --visible_devices=0,1,2,3,4,5,6,7 "
    "--env_sh=/path/to/env_sh.sh "
    "--server_id=xx.xxx.xxx.xxx /path/to/train.py --per_batch_size=256 "
    "--data_dir=/path/to/dataset/train/ --is_distributed=1 "
    "--lr_scheduler=cosine_annealing --weight_decay=0.0001 --lr=0.13 --T_max=150 --max_epoch=150 "
    "--warmup_epochs=5 --label_smooth=1 "
    "--backbone=alexnet"
)
ALEXNET_TEST = (
    "python /path/to/launch.py --nproc_per_node=8 --visible_devices=0,1,2,3,4,5,6,7 --mode=test "
    "--server_id=xx.xxx.xxx.xxx "
    "--env_sh=/path/to/env_sh.sh /path/to/test.py --data_dir=/path/to/dataset/val "
    "--per_batch_size=32 --pretrained=/path/to/ckpt"
)
RESNEXT = (
    'python3 train.py --run_distribute=0 --device_target="GPU" '
    "--data_path=/path/to/imagenet/train --output_path /path/to/checkpoint"
)
RESNEXT_MPI = (
    "mpirun --allow-run-as-root -n 8 --output-filename log_output --merge-stderr-to-stdout python3 "
    "train.py --run_distribute=1 "
    '--device_target="GPU" --data_path=/path/to/imagenet/train --output_path /path/to/checkpoint'
)
RESNEXT_EVAL = (
    'python3 eval.py --data_path=/path/to/imagenet/val --device_target="GPU" '
    "--checkpoint_file_path=/path/to/checkpoint/model_data_dir/ckpt_0/"
)
ACNET = "python3 -m torch.distributed.launch --nproc_per_node=1 acnet/do_acnet.py -a sres18 -b acb"
ACNET_EIGHT = (
    "python3 -m torch.distributed.launch --nproc_per_node=8 acnet/do_acnet.py -a sres18 -b acb"
)

SHARED = {
    "momentum": 0.9,
    "optimizer": "momentum",
    "weight_decay": 1e-4,
    "decay_norm_and_bias": False,
    "bias_lr_factor": 1,
    "lr_scheduler": "cosine_annealing",
    "lr_interval": "epoch",
    "eta_min": 0,
    "label_smooth_factor": 0.1,
    "label_smooth_over": "others",
    "max_epoch": 150,
    "augmentations": ["crop", "flip", "color_jitter"],
    "train_crop": "random_resized",
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (0.75, 1.333),
    "flip_probability": 0.5,
    "color_jitter": (0.4, 0.4, 0.4),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "image_size": 224,
    "resized_side": 256,
    "eval_resize_mode": "square",
    "antialias": False,
    "weight_init": "kaiming_uniform",
    "zero_init_residual": False,
    "loss_scale": 1024,
    "is_dynamic_loss_scale": False,
    "block": "base",
    "ckpt_interval": 5,
    "keep_checkpoint_max": 5,
}
ACNET_KEYS = {
    "network": "resnet18",
    "block": "acb",
    "gamma_init": 1,
    "global_batch_size": 256,
    "lr": 0.1,
    "max_epoch": 100,
    "lr_scheduler": "cosine_annealing",
    "lr_interval": "step",
    "warmup_epochs": 0,
    "eta_min": 0,
    "optimizer": "momentum",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_norm_and_bias": True,
    "bias_lr_factor": 2,
    "smoothing": 0,
    "color_jitter": (0, 0, 0),
    "crop_scale": (0.08, 1.0),
    "data_path": "imagenet_data",
    "eval_resize_mode": "shorter_side",
    "resized_side": 256,
    "antialias": True,
    "image_size": 224,
    "run_eval": True,
    "eval_interval": 5,
    "deploy": True,
    "weight_init": "kaiming_uniform",
}


@pytest.mark.parametrize(
    "line,script,expected",
    [
        (
            ALEXNET,
            "/path/to/train.py",
            {
                **SHARED,
                "network": "alexnet",
                "dropout": 0.35,
                "lr": 0.13,
                "per_batch_size": 256,
                "T_max": 150,
                "warmup_epochs": 5,
                "run_distribute": True,
            },
        ),
        (
            RESNEXT,
            "train.py",
            {
                **SHARED,
                "network": "resnext50_32x4d",
                "lr": 0.4,
                "per_batch_size": 128,
                "warmup_epochs": 1,
                "device_target": "GPU",
                "precision": "O3",
                "run_distribute": False,
            },
        ),
        (
            RESNEXT_MPI,
            "train.py",
            {
                **SHARED,
                "network": "resnext50_32x4d",
                "lr": 0.4,
                "per_batch_size": 128,
                "warmup_epochs": 1,
                "device_target": "GPU",
                "precision": "O3",
                "run_distribute": True,
            },
        ),
        (ACNET, "acnet/do_acnet.py", ACNET_KEYS),
        (ACNET_EIGHT, "acnet/do_acnet.py", ACNET_KEYS),
    ],
    ids=["alexnet", "resnext50", "resnext50 by mpirun", "acnet", "acnet on 8"],
)
def test_a_seeds_line_resolves_to_its_hyper_parameters(line, script, expected):
    words = shlex.split(line)
    flags, positional = parse_flags(words[words.index(script) + 1 :])
    config = load_config(flags)
    assert {key: getattr(config, key) for key in expected} == expected and positional == []


# acnet/do_acnet.py of the ACNet repository, network by network.
@pytest.mark.parametrize(
    "name,lr,epochs,batch,decay,gamma",
    [
        ("sres34", 0.1, 100, 256, 1e-4, 1),
        ("sres50", 0.1, 100, 256, 1e-4, 1),
        ("cfqkbnc", 0.1, 150, 128, 1e-4, 0.333),
        ("src56", 0.2, 400, 128, 1e-4, 0.333),
        ("vc", 0.1, 400, 128, 1e-4, 0.333),
        ("wrnc16plain", 0.1, 400, 128, 5e-4, 0.333),
    ],
)
def test_acnets_other_networks(name, lr, epochs, batch, decay, gamma):
    config = load_config({"network": name, "block": "acb"})
    assert (
        config.lr,
        config.max_epoch,
        config.global_batch_size,
        config.weight_decay,
        config.gamma_init,
    ) == (lr, epochs, batch, decay, gamma)
    assert (
        config.lr_interval,
        config.bias_lr_factor,
        config.decay_norm_and_bias,
        config.deploy,
    ) == ("step", 2, True, True)


def test_a_network_brings_what_belongs_to_it_and_flags_win():
    assert load_config({"network": "alexnet", "data_path": "x"}).dropout == 0.35
    assert load_config({"network": "alexnet", "data_path": "x", "dropout": "0.5"}).dropout == 0.5
    small = load_config({"network": "src56", "data_path": "x", "config_path": "digits"})
    assert (small.image_size, small.lr, small.block) == (32, 0.05, "acb")
    assert (
        load_config(
            {"network": "sres18", "data_path": "x", "config_path": "alexnet_imagenet"}
        ).gamma_init
        == 1
    )
    plain = load_config({"network": "resnet18", "data_path": "x"})
    assert (plain.eval_resize_mode, plain.antialias, plain.lr, plain.block) == (
        "shorter_side",
        True,
        0.4,
        "base",
    )


def typed(line, paths, *added):
    """The words of a line with its paths replaced, and flags added behind it."""
    for there, here in paths.items():
        line = line.replace(there, str(here))
    return [*shlex.split(line), *added]


def resolved(output_path):
    return yaml.safe_load((only_run(output_path) / "config.yaml").read_text())


@pytest.mark.slow
def test_alexnet(image_root, tmp_path):
    (tmp_path / "env.sh").write_text("export SEED_ENVIRONMENT=1\n")
    paths = {
        "python ": "python3 ",
        "/path/to/launch.py": ROOT / "scripts/launch.py",
        "/path/to/env_sh.sh": tmp_path / "env.sh",
        "/path/to/train.py": ROOT / "train.py",
        "/path/to/test.py": "/path/to/test.py",
        "/path/to/dataset": image_root,
        "--nproc_per_node=8": "--nproc_per_node=2",
    }
    run = execute(
        typed(
            ALEXNET,
            paths,
            "--per_batch_size=2",
            "--image_size=64",
            "--max_steps=2",
            f"--output_path={tmp_path}/out",
        )
    )
    assert run.status == 0, run
    config = resolved(tmp_path / "out")
    assert (config["dropout"], config["lr"], config["T_max"], config["warmup_epochs"]) == (
        0.35,
        0.13,
        150,
        5,
    )
    paths["/path/to/ckpt"] = only_run(tmp_path / "out") / "ckpt_0"
    tested = execute(typed(ALEXNET_TEST, paths))
    assert tested.status == 0 and "67 images" in tested.out, tested
    assert re.search(r"^Top1/Top5 \d+\.\d\d%/\d+\.\d\d%, .* [\d.]+ img/s$", tested.out, re.M), (
        tested
    )


@pytest.mark.parametrize(
    "ranks,added",
    [
        pytest.param(2, ["--max_steps=12"], marks=pytest.mark.slow),
        pytest.param(8, ["--network=cifar_quick", "--max_steps=1"], marks=pytest.mark.extended),
    ],
)
def test_resnext50_by_mpirun_shows_its_progress_and_where_the_log_is(
    image_root, tmp_path, ranks, added
):
    """Open MPI 5 writes all output to log_output.prterun-* alone, where Open MPI 4 copied it."""
    paths = {
        "-n 8": f"--map-by :OVERSUBSCRIBE -n {ranks}",
        "train.py": ROOT / "train.py",
        "/path/to/imagenet": image_root,
        "/path/to/checkpoint": tmp_path / "out",
    }
    run = execute(
        typed(
            RESNEXT_MPI,
            paths,
            "--device_target=CPU",
            "--image_size=32",
            "--per_batch_size=2",
            "--max_epoch=1",
            "--lr=0.001",
            *added,
        ),
        cwd=tmp_path,
    )
    assert run.status == 0, run
    folder = only_run(tmp_path / "out")
    lines = run.out.splitlines()
    assert lines[0].endswith(f"the log will be {folder / 'log.txt'}"), run
    assert any(re.match(r"epoch 1/1 step 1/\d+ loss", line) for line in lines), run
    assert re.search(
        r"^FPS: [\d.]+ img/s in total, [\d.]+ img/s per device, [\d.]+ it/s$", run.out, re.M
    ), run
    (of_mpirun,) = tmp_path.glob("log_output*0.out")
    assert of_mpirun.read_text().splitlines() == lines
    evaluated = execute(
        typed(
            RESNEXT_EVAL,
            {"eval.py": ROOT / "eval.py", **paths, "model_data_dir": folder.name},
            "--device_target=CPU",
        )
    )
    assert evaluated.status == 0 and re.search(
        r"acc=\d+\.\d\d%\(TOP1\) acc=\d+\.\d\d%\(TOP5\) 67 images", evaluated.out
    ), evaluated


@pytest.mark.slow
def test_an_error_reaches_the_user_of_that_line_too(tmp_path):
    paths = {
        "-n 8": "-n 2",
        "train.py": ROOT / "train.py",
        "/path/to/imagenet": tmp_path / "nowhere",
        "/path/to/checkpoint": tmp_path / "out",
    }
    run = execute(typed(RESNEXT_MPI, paths, "--device_target=CPU"), cwd=tmp_path)
    assert (
        run.status == 2
        and f"error: data_path '{tmp_path}/nowhere/train' does not exist" in run.out + run.err
    ), run


def check_acnets_ending(run, output_path):
    """As there: the trained network tested, converted, tested again."""
    assert run.status == 0, run
    trained, fused = (
        re.search(rf"^{form}: (top1=\d+\.\d{{5}},top5=\d+\.\d{{5}}) (\S+)$", run.out, re.M)
        for form in ("trained", "fused")
    )
    assert trained and fused and trained.group(1) == fused.group(1), run
    difference = re.search(
        r"^difference: top1=0\.00000,top5=0\.00000, outputs (\S+)$", run.out, re.M
    )
    assert float(difference.group(1)) < 1e-5
    names = read_weights(fused.group(2))[0]
    assert "layer1.0.conv1.bias" in names and not any("square" in name for name in names)
    config = resolved(output_path)
    assert (config["network"], config["block"], config["bias_lr_factor"], config["run_eval"]) == (
        "resnet18",
        "acb",
        2,
        True,
    )


SMALL_ACNET = ["--image_size=32", "--global_batch_size=8", "--max_steps=1"]


@pytest.mark.slow
def test_acnet(image_root, tmp_path):
    """Through the `imagenet_data` link, on two ranks by our launcher."""
    (tmp_path / "imagenet_data").symlink_to(image_root)
    paths = {
        "-m torch.distributed.launch": ROOT / "scripts/launch.py",
        "--nproc_per_node=8": "--nproc_per_node=2",
        "acnet/": f"{ROOT}/acnet/",
    }
    run = execute(
        typed(ACNET_EIGHT, paths, "-c", "fs", "--local_rank", "0", *SMALL_ACNET), cwd=tmp_path
    )
    check_acnets_ending(run, tmp_path / "acnet_exps/sres18_acb_train")
    assert "acc=" in run.out, run


@pytest.mark.extended
@pytest.mark.parametrize("line,ranks", [(ACNET, 1), (ACNET_EIGHT, 2)])
def test_acnet_under_torchs_own_launcher(image_root, tmp_path, line, ranks):
    pytest.importorskip("torch", reason="PyTorch, a development-only dependency, is not installed")
    (tmp_path / "imagenet_data").symlink_to(image_root)
    run = execute(
        typed(
            line,
            {"--nproc_per_node=8": "--nproc_per_node=2", "acnet/": f"{ROOT}/acnet/"},
            *SMALL_ACNET,
        ),
        cwd=tmp_path,
    )
    check_acnets_ending(run, tmp_path / "acnet_exps/sres18_acb_train")
    assert f"resnet18 on {ranks} x CPU" in run.out, run


@pytest.mark.extended
def test_acnet_continues_what_was_trained(image_root, tmp_path):
    (tmp_path / "imagenet_data").symlink_to(image_root)
    command = [
        "python3",
        ROOT / "acnet/do_acnet.py",
        "-b",
        "base",
        "--image_size=32",
        "--global_batch_size=8",
        "--run_eval=0",
        "--deploy=0",
    ]
    assert execute([*command, "--max_steps=2"], cwd=tmp_path).status == 0
    run = execute([*command, "--max_steps=3", "-c", "continue"], cwd=tmp_path)
    assert run.status == 0 and "after step 2" in run.out, run
    assert (
        only_run(tmp_path / "acnet_exps/sres18_base_train") / "ckpt_0" / "resnet18-1_3.ckpt"
    ).exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["-c", "perhaps"], "perhaps"),
        (["-a", "sres19"], "sres18"),
        (["--network=resnet18"], "sres18"),
        (["-b", "abc"], "acb"),
        (["--tb_dir=x"], "unknown flag '--tb_dir'"),
    ],
)
def test_what_do_acnet_does_not_know_is_one_line(tmp_path, image_root, arguments, message):
    (tmp_path / "imagenet_data").symlink_to(image_root)
    run = execute(
        [
            "python3",
            ROOT / "acnet/do_acnet.py",
            *arguments,
            "--image_size=32",
            "--global_batch_size=8",
        ],
        cwd=tmp_path,
    )
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and message in run.error_lines[0]
        and "Traceback" not in run.err
    ), run


@pytest.mark.extended
def test_a_trained_hdf5_of_acnets_is_fused_and_evaluated(image_root, tmp_path):
    """acnet/acnet_test.py: converted weights have the same accuracy before and after."""
    h5py = pytest.importorskip("h5py")
    network = create_model("resnet18", 3, "acb")
    randomise(network)
    with h5py.File(tmp_path / "finish.hdf5", "w") as file:
        for parameter in network.get_parameters():
            file[acnet_name(parameter.name, "resnet18")] = parameter.asnumpy()
    words = ["--network=sres18", "--image_size=32"]
    exported = execute(
        ["python3", "export.py", f"--checkpoint_file_path={tmp_path}/finish.hdf5", *words]
    )
    assert exported.status == 0, exported
    found = []
    for name in ("finish.hdf5", "finish_fused.ckpt"):
        run = execute(
            [
                "python3",
                "eval.py",
                f"--data_path={image_root}/val",
                f"--checkpoint_file_path={tmp_path}/{name}",
                *(words if name.endswith("hdf5") else []),
            ]
        )
        assert run.status == 0, run
        found.append(re.search(r"top1=[\d.]+,top5=[\d.]+", run.out).group())
    assert found[0] == found[1]
    before, after = (
        sum(array.size for array in read_weights(tmp_path / name)[0].values())
        for name in ("finish.hdf5", "finish_fused.ckpt")
    )
    assert after < before / 1.5


def test_a_tree_as_the_seeds_show_it_is_read_through_its_link(tmp_path, image_root):
    """train/ and val/ next to train_list.txt and val_list.txt.

    Whose lines name files under the tree or under its parts.
    """
    from src.dataset.sources import open_images

    tree = tmp_path / "imagenet"
    tree.mkdir()
    for part in ("train", "val"):
        (tree / part).symlink_to(image_root / part)
        files = sorted((image_root / part).glob("*/*.jpg"))
        classes = sorted({file.parent.name for file in files})
        prefix = f"{part}/" if part == "train" else ""
        (tree / f"{part}_list.txt").write_text(
            "".join(
                f"{prefix}{f.parent.name}/{f.name} {classes.index(f.parent.name)}\n" for f in files
            )
        )
    os.symlink(tree, tmp_path / "imagenet_data")
    for part, count in (("train", 48), ("val", 67)):
        by_list, by_folder = (
            open_images(str(tmp_path / "imagenet_data"), part),
            open_images(str(image_root / part), part),
        )
        assert len(by_list) == count and by_list.class_to_index == by_folder.class_to_index
        assert np.array_equal(by_list.labels, by_folder.labels)
