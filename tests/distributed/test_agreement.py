"""Ranks that differ end before the first step, with one line that says what differs."""

import shutil

import pytest
from conftest import ROOT, TINY, execute, write_image_folder

from src.distributed.communicator import Communicator, check_ranks_agree
from src.utils.errors import UserError


class Ranks(Communicator):
    """Rank 0 of several, the others' facts given."""

    def __init__(self, *others):
        self.size, self._others = 1 + len(others), others

    def all_gather(self, value):
        return [value, *self._others]


def test_the_first_difference_is_named_with_values_and_ranks():
    check_ranks_agree(Ranks({"lr": 0.1}, {"lr": 0.1}), {"lr": 0.1})
    with pytest.raises(UserError, match=r"lr=0.1 on ranks 0, 2 and lr=0.5 on rank 1; start"):
        check_ranks_agree(Ranks({"lr": 0.5}, {"lr": 0.1}), {"lr": 0.1})
    with pytest.raises(UserError, match=r"seed=1 on rank 0 and seed=\(nothing\) on rank 1"):
        check_ranks_agree(Ranks({"lr": 0.1}), {"lr": 0.1, "seed": 1})


def test_long_values_are_compared_whole_and_shown_in_part():
    with pytest.raises(
        UserError, match=r'names="x{59}\.\.\. on rank 0 and names="x{59}\.\.\. on rank 1'
    ):
        check_ranks_agree(Ranks({"names": "x" * 100 + "b"}), {"names": "x" * 100 + "a"})


def pair(script, common, first, second):
    """Two ranks with different flags, as `mpirun -n 1 A : -n 1 B` starts them."""
    sides = [["-n", "1", "python3", script, *common, *flags] for flags in (first, second)]
    return execute(["mpirun", "--map-by", ":OVERSUBSCRIBE", *sides[0], ":", *sides[1]], timeout=60)


def assert_refused(run, *words):
    assert run.status == 2 and len(run.error_lines) == 1 and "Traceback" not in run.err, run
    for word in ("the ranks do not agree", *words):
        assert word in run.error_lines[0], run


LESS = pytest.mark.extended


@pytest.mark.slow
@pytest.mark.parametrize(
    "first,second,words",
    [
        (["--lr=0.01"], ["--lr=0.5"], ("lr=0.01 on rank 0 and lr=0.5 on rank 1",)),
        pytest.param(["--seed=1"], ["--seed=2"], ("seed=1", "seed=2"), marks=LESS),
        pytest.param(["--max_epoch=1"], ["--max_epoch=2"], ("max_epoch",), marks=LESS),
        (
            ["--network=alexnet", "--image_size=64"],
            ["--network=resnet18", "--image_size=64"],
            ('network="alexnet"', 'network="resnet18"'),
        ),
        (["--per_batch_size=2"], ["--per_batch_size=4"], ("per_batch_size=2 on rank 0",)),
        pytest.param(["--run_eval=1"], ["--run_eval=0"], ("run_eval=true",), marks=LESS),
        pytest.param(
            ["--bad_samples=error"], ["--bad_samples=replace"], ("bad_samples",), marks=LESS
        ),
    ],
)
def test_other_flags_end_the_training(image_root, tmp_path, first, second, words):
    common = [f"--data_path={image_root}/train", f"--output_path={tmp_path}/out", *TINY]
    assert_refused(pair("train.py", common, first, second), *words)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def other_images(tmp_path_factory):
    """name -> the root of images that differ from ``image_root``."""
    root = tmp_path_factory.mktemp("other")
    for name, classes, count in (
        ("renamed", ("ant", "bee", "dog"), 16),
        ("fewer", ("ant", "bee", "cat"), 12),
    ):
        write_image_folder(root / name, "train", classes, count)
        write_image_folder(root / name, "val", classes, count, seed=1)
    # The same names and labels, of other pictures.
    write_image_folder(root / "changed", "train", ("ant", "bee", "cat"), 16, seed=7)
    write_image_folder(root / "uneven", "train", ("ant",), 8)
    write_image_folder(root / "uneven", "train", ("bee",), 24)
    write_image_folder(root / "uneven", "train", ("cat",), 16)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,word",
    [
        ("renamed", 'training class 2="cat" on rank 0 and training class 2="dog" on rank 1'),
        ("fewer", "number of training images=48 on rank 0"),
        ("uneven", "checksum of training labels"),
        ("changed", "checksum of names and sizes of training images"),
    ],
)
def test_other_images_end_the_training(image_root, other_images, tmp_path, name, word):
    common = [f"--output_path={tmp_path}/out", *TINY]
    assert_refused(
        pair(
            "train.py",
            common,
            [f"--data_path={image_root}/train"],
            [f"--data_path={other_images}/{name}/train"],
        ),
        word,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.extended
def test_the_same_images_at_another_place_are_the_same(image_root, broken_copy, tmp_path):
    common = [f"--output_path={tmp_path}/out", *TINY, "--max_steps=2", "--lr=0.01"]
    run = pair(
        "train.py",
        common,
        [f"--data_path={image_root}/train"],
        [f"--data_path={broken_copy}/train", "--num_parallel_workers=1"],
    )
    assert run.status == 0, run


@pytest.mark.slow
def test_evaluation_of_other_images_or_weights_is_refused(trained_run, image_root, other_images):
    weights = f"--checkpoint_file_path={trained_run}/best.ckpt"
    run = pair(
        "eval.py",
        [weights],
        [f"--data_path={image_root}/val"],
        [f"--data_path={other_images}/fewer/val"],
    )
    assert_refused(run, "number of validation images=67 on rank 0")
    # The defaults, which are not what the checkpoint records.
    run = pair(
        "eval.py", [weights, f"--data_path={image_root}/val"], [], ["--mean=0.485,0.456,0.406"]
    )
    assert_refused(run, "mean=")
    first, second = sorted((trained_run / "ckpt_0").iterdir())
    run = pair(
        "eval.py",
        [f"--data_path={image_root}/val"],
        [f"--checkpoint_file_path={first}"],
        [f"--checkpoint_file_path={second}"],
    )
    assert_refused(run, "checksum of")


def test_a_number_of_ranks_that_the_launcher_did_not_start_is_refused(tmp_path):
    run = execute(["mpirun", "-n", "1", "python3", "train.py", "--ranks=2", *TINY])
    assert run.status == 2 and "ranks=2, but the launcher started 1" in run.error_lines[0], run


@pytest.mark.slow
def test_other_programs_end_the_training(image_root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".venv*", ".git", "outputs", "__pycache__", "tests", "benchmarks"
        ),
    )
    with open(copy / "src" / "training" / "schedule.py", "a") as file:
        file.write("# changed\n")
    flags = [f"--data_path={image_root}/train", f"--output_path={tmp_path}/out", *TINY]
    run = execute(
        [
            "mpirun",
            "--map-by",
            ":OVERSUBSCRIBE",
            "-n",
            "1",
            "python3",
            "train.py",
            *flags,
            ":",
            "-n",
            "1",
            "python3",
            str(copy / "train.py"),
            *flags,
        ],
        timeout=60,
    )
    assert_refused(run, "program=", "on rank 0 and", "install the same")
