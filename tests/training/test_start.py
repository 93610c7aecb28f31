"""What the checkpoint of a run holds, and from which one ranks resume."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_config
from mindspore import Parameter, Tensor

from src.dataset.image_set import are_numbers_sorted_as_text
from src.dataset.splits import TrainingData
from src.distributed.communicator import Communicator
from src.models.create import create_model
from src.runs.checkpoint import TrainingState, read_training_state, restore_arrays, save_checkpoint
from src.runs.recorder import Recorder
from src.runs.run_folder import RunFolder, checkpoint_position, in_order
from src.training.start import (
    PretrainedWeights,
    ResumePoint,
    find_resume_point,
    read_pretrained,
    resume_message,
)
from src.utils.errors import UserError


def state(step=15, **changes):
    values = dict(
        step=step,
        epoch=2,
        finished_epoch=False,
        epoch_sums={"loss": 1.25, "skipped": 0, "replaced": 3},
        best_top1=71.5,
        steps_per_epoch=12,
        world_size=2,
        threads=[1, 1],
        labels=99,
        class_to_index={"a": 0},
        config=make_config().model_dump(mode="json"),
        optimizer={"updates": step},
        loss_scale={"value": 1.0, "good_steps": step},
    )
    return TrainingState(**{**values, **changes})


@pytest.fixture
def network():
    return create_model("cifar_quick", 4)


def moments(network):
    random = np.random.default_rng(0)
    return [
        Parameter(
            Tensor(random.normal(size=p.shape).astype(np.float32)),
            name=f"optimizer.momentum.{p.name}",
        )
        for p in network.trainable_params()
    ]


def test_what_is_written_is_read(tmp_path, network):
    optimizer_state = moments(network)
    state().write(tmp_path / "a.ckpt", network, optimizer_state)
    found, arrays = read_training_state(str(tmp_path / "a.ckpt"))
    assert found == state()
    other = create_model("cifar_quick", 4)
    others = [
        Parameter(Tensor(np.zeros(p.shape, np.float32)), name=p.name) for p in optimizer_state
    ]
    restore_arrays(arrays, tmp_path / "a.ckpt", other, others)
    for a, b in zip(
        [*network.get_parameters(), *optimizer_state], [*other.get_parameters(), *others]
    ):
        assert np.array_equal(a.asnumpy(), b.asnumpy()), a.name


@pytest.mark.parametrize(
    "classes,words",
    [
        ({"a": 1, "b": 0, "c": 2, "d": 3}, "for 4 classes, which 'w.ckpt' has in another order"),
        ({"a": 0, "b": 1, "c": 2, "e": 3}, "for 4 classes instead of 4 other"),
    ],
)
def test_a_new_classifier_says_why(network, classes, words):
    trainer = SimpleNamespace(
        network=network,
        config=make_config(network="cifar_quick", num_classes=4, allow_head_mismatch=1),
        recorder=Recorder(),
        class_to_index={"a": 0, "b": 1, "c": 2, "d": 3},
        communicator=Communicator(),
        data=TrainingData(None, None),
        seen_before=0,
    )
    arrays = {p.name: p.asnumpy() for p in network.get_parameters()}
    weights = PretrainedWeights("w.ckpt", arrays, {}, classes, {})
    assert weights.load_into(trainer).endswith(words) and not trainer.has_pretrained_classifier
    same = PretrainedWeights("w.ckpt", arrays, {}, dict(trainer.class_to_index), {})
    assert same.load_into(trainer) == "starting from w.ckpt" and trainer.has_pretrained_classifier


def test_optimizer_state_that_is_missing_is_named(tmp_path, network):
    state().write(tmp_path / "a.ckpt", network, [])
    _, arrays = read_training_state(str(tmp_path / "a.ckpt"))
    with pytest.raises(UserError, match="no optimizer state optimizer.momentum.conv1.conv.weight"):
        restore_arrays(arrays, tmp_path / "a.ckpt", network, moments(network))


@pytest.mark.parametrize(
    "metadata,message",
    [
        ({}, "not a checkpoint of a training run"),
        ({"fused": True, "config": {}}, "not a checkpoint of a training run"),
        ({"step": 3, "world_size": 1}, "another version of this program"),
    ],
)
def test_other_checkpoints_are_refused_with_what_to_do(tmp_path, network, metadata, message):
    save_checkpoint(tmp_path / "a.ckpt", network.get_parameters(), metadata)
    with pytest.raises(UserError, match=f"{message}.*--checkpoint_file_path"):
        read_training_state(str(tmp_path / "a.ckpt"))


class OtherRank(Communicator):
    """Rank 0 of two; the other cannot read checkpoints with ``unreadable`` in their names."""

    size = 2

    def __init__(self, unreadable):
        self._unreadable, self._paths = unreadable, iter(())

    def broadcast_object(self, value):
        self._paths = iter(value)
        return value

    def all_gather(self, value):
        return [value, "rank 1 cannot" if self._unreadable in next(self._paths) else ""]


def write_config(folder):
    """What tells that a folder is the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(make_config().to_yaml())


@pytest.fixture
def run_folder(tmp_path, network):
    """A run with checkpoints of steps 5, 10 and 15; the newest is the last."""
    write_config(tmp_path / "run")
    for step in (5, 10, 15):
        state(step).write(tmp_path / "run" / "ckpt_0" / f"n-1_{step}.ckpt", network, [])
    return tmp_path


def test_all_ranks_take_the_newest_that_every_rank_can_read(run_folder):
    config = make_config(resume="auto", output_path=str(run_folder))
    assert find_resume_point(config, Communicator()).state.step == 15
    point = find_resume_point(config, OtherRank("1_15"))
    assert point.state.step == 10 and [path[-9:] for path in point.skipped] == ["1_15.ckpt"]
    with pytest.raises(UserError, match="rank 1 cannot"):
        find_resume_point(config, OtherRank("ckpt"))


def test_the_folder_of_a_run_means_its_newest_checkpoint(run_folder, network):
    """Also if another run is newer, as after a restart by scripts/launch.py."""
    write_config(run_folder / "a_newer_run")
    state(20).write(run_folder / "a_newer_run" / "ckpt_0" / "n-1_20.ckpt", network, [])
    config = make_config(resume=str(run_folder / "run"), output_path=str(run_folder))
    assert find_resume_point(config, Communicator()).state.step == 15
    assert find_resume_point(config, OtherRank("1_15")).state.step == 10
    with pytest.raises(UserError, match="is not the folder of a run with checkpoints"):
        find_resume_point(make_config(resume=str(run_folder)), Communicator())


def test_a_checkpoint_that_is_asked_for_is_not_passed_over(run_folder):
    file = run_folder / "run" / "ckpt_0" / "n-1_15.ckpt"
    with pytest.raises(UserError, match="rank 1 cannot"):
        find_resume_point(make_config(resume=str(file)), OtherRank("1_15"))


def test_keys_that_differ_are_named_unless_they_only_say_where_and_how(run_folder):
    keys = {"resume": "auto", "output_path": str(run_folder)}
    assert find_resume_point(
        make_config(**keys, log_interval=3, num_parallel_workers=2, data_path="elsewhere"),
        Communicator(),
    )
    for key, value in (
        ("lr", 0.7),
        ("optimizer", "adamw"),
        ("augmentations", "crop"),
        ("label_smooth_factor", 0),
    ):
        with pytest.raises(UserError, match=f"of another run: {key}="):
            find_resume_point(make_config(**keys, **{key: value}), Communicator())


@pytest.mark.parametrize(
    "antialias,reduced,message",
    [(True, "never", None), (True, "train", "reduced_decoding=never"), (False, "train", None)],
)
def test_a_run_from_before_reduced_decoding_goes_on_with_whole_images(
    run_folder, network, antialias, reduced, message
):
    config = make_config(antialias=antialias).model_dump(mode="json")
    del config["reduced_decoding"]
    file = run_folder / "run" / "ckpt_0" / "n-1_16.ckpt"
    state(16, config=config).write(file, network, [])
    asked = make_config(resume=str(file), antialias=antialias, reduced_decoding=reduced)
    if message is None:
        assert find_resume_point(asked, Communicator()).state.step == 16
        return
    with pytest.raises(UserError, match=f"of another run: {message} there"):
        find_resume_point(asked, Communicator())


def test_the_newest_is_the_one_with_the_most_steps_whatever_the_files_times(run_folder):
    """As after a copy, which gives files new times."""
    files = sorted(
        (run_folder / "run" / "ckpt_0").iterdir(),
        key=lambda file: int(file.stem.rpartition("_")[2]),
    )
    for age, file in enumerate(files):
        os.utime(file, (10**9 - age, 10**9 - age))
    config = make_config(resume="auto", output_path=str(run_folder))
    assert find_resume_point(config, Communicator()).state.step == 15


def test_of_copies_of_a_run_the_one_with_the_most_steps_is_the_newest(run_folder):
    run = run_folder / "2026-01-01_time_00_00_00"
    (run_folder / "run").rename(run)
    shutil.copytree(run, run_folder / f"{run.name}_backup")
    (run_folder / f"{run.name}_backup" / "ckpt_0" / "n-1_15.ckpt").unlink()
    config = make_config(resume="auto", output_path=str(run_folder))
    assert find_resume_point(config, Communicator()).path == run / "ckpt_0" / "n-1_15.ckpt"


@pytest.mark.parametrize("best,taken", [(12, "n-1_15.ckpt"), (18, "best.ckpt")])
def test_the_best_checkpoint_counts_by_its_step(run_folder, network, best, taken):
    state(best, epoch=1, steps_per_epoch=20).write(run_folder / "run" / "best.ckpt", network, [])
    config = make_config(resume="auto", output_path=str(run_folder))
    assert find_resume_point(config, Communicator()).path.name == taken


def test_of_several_runs_the_newest_that_matches_is_taken(run_folder, network):
    (run_folder / "run").rename(run_folder / "2026-01-01_time_00_00_00")
    other = make_config(lr=0.123).model_dump(mode="json")
    write_config(run_folder / "2026-02-02_time_00_00_00")
    state(5, config=other).write(
        run_folder / "2026-02-02_time_00_00_00" / "ckpt_0" / "n-1_5.ckpt", network, []
    )
    config = make_config(resume="auto", output_path=str(run_folder))
    point = find_resume_point(config, Communicator())
    assert (
        "2026-01-01" in str(point.path)
        and point.state.step == 15
        and "2026-02-02" in point.skipped[0]
    )
    with pytest.raises(UserError, match="2026-02-02.*another run: seed"):
        find_resume_point(
            make_config(resume="auto", output_path=str(run_folder), seed=9, lr=0.123),
            Communicator(),
        )


@pytest.mark.parametrize(
    "before,now",
    [
        ({"lr_scheduler": "step"}, {"lr_scheduler": "step"}),
        ({"lr_scheduler": "exponential"}, {"lr_scheduler": "exponential"}),
        ({"T_max": 150}, {"T_max": 150}),
        ({}, {"T_max": 150}),
    ],
)
def test_more_epochs_are_allowed_if_the_past_of_the_schedule_stays(tmp_path, network, before, now):
    file = tmp_path / "run" / "ckpt_0" / "n-2_3.ckpt"
    write_config(tmp_path / "run")
    state(config=make_config(**before).model_dump(mode="json")).write(file, network, [])
    for epochs in (200, 100):
        assert (
            find_resume_point(
                make_config(resume=str(file), max_epoch=epochs, **now), Communicator()
            ).state.step
            == 15
        )
    with pytest.raises(UserError, match="another run: max_epoch=150 there and 1 here"):
        find_resume_point(make_config(resume=str(file), max_epoch=1, **now), Communicator())


def test_more_epochs_of_a_cosine_name_the_key_that_makes_them_possible(tmp_path, network):
    file = tmp_path / "run" / "ckpt_0" / "n-2_3.ckpt"
    write_config(tmp_path / "run")
    state().write(file, network, [])
    with pytest.raises(UserError, match="max_epoch=150.*add --T_max=150"):
        find_resume_point(make_config(resume=str(file), max_epoch=200), Communicator())


def test_other_threads_are_said_on_resuming():
    point = ResumePoint(Path("a.ckpt"), state(), {})
    assert "threads" not in resume_message(
        point, 2, [1, 1], "mindspore"
    ) and "kernels" not in resume_message(point, 2, [1, 1], "mindspore")
    assert "1 threads and continue with 2, 1, which rounds" in resume_message(
        point, 2, [2, 1], "mindspore"
    )
    assert "it ran on 2 ranks and continues on 1" in resume_message(point, 1, [2], "mindspore")
    assert "kernels of mindspore and continues with those of onednn, avx2" in resume_message(
        point, 2, [1, 1], "onednn, avx2"
    )


def test_other_software_is_said_on_resuming():
    recorded = replace(state(15), software={"program": "1", "numpy": "1.0", "gone": "3"})
    text = resume_message(ResumePoint(Path("x"), recorded, {}), 1, [1], recorded.kernels)
    assert "\nwarning: it ran with numpy 1.0 and continues with" in text and "gone" not in text
    # Every edit of the program is another one: that is no warning.
    assert "\nit ran with program 1 and continues with" in text
    assert "it ran with" not in resume_message(
        ResumePoint(Path("x"), state(15), {}), 1, [1], recorded.kernels
    )


@pytest.mark.parametrize("name", ["n-1_15.ckpt", "best.ckpt"])
def test_a_checkpoint_that_was_copied_out_of_its_run_is_refused(run_folder, tmp_path, name):
    """Nothing is written into the folder around the copy."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    shutil.copy(run_folder / "run" / "ckpt_0" / "n-1_15.ckpt", downloads / name)
    config = make_config(resume=str(downloads / name))
    with pytest.raises(UserError, match="not in its run folder.*--checkpoint_file_path="):
        find_resume_point(config, Communicator())
    assert [file.name for file in downloads.iterdir()] == [name]


def test_the_newest_checkpoint_may_be_named_by_its_link(run_folder):
    folder = RunFolder(run_folder / "run")
    folder.point_latest_at(folder.checkpoints / "n-1_10.ckpt")
    point = find_resume_point(make_config(resume=str(folder.latest)), Communicator())
    assert point.state.step == 10 and point.run_folder.path == folder.path.resolve()


def test_the_order_of_evaluation_is_that_of_resuming():
    """Both read the numbers at the end of a name only."""
    names = ["run-2_9-1_5.ckpt", "n-10_1.ckpt", "n-9_45.ckpt", "n-9_100.ckpt", "x-3_4-old.ckpt"]
    paths = [Path(name) for name in names]
    assert [path.name for path in in_order(paths)] == [names[4], names[0], *names[2:4], names[1]]
    assert sorted(paths, key=checkpoint_position)[-1] == in_order(paths)[-1]


@pytest.mark.parametrize(
    "file,content,expected",
    [
        ("config.json", {"architecture": "resnet18", "label_names": ["b", "a"]}, {"b": 0, "a": 1}),
        ("class_indexing.json", {"b": 0, "a": 1}, {"b": 0, "a": 1}),
        (None, None, None),
    ],
)
def test_the_classes_of_weights_are_those_that_evaluation_takes(tmp_path, file, content, expected):
    """Training took none of them, and learnt the classes in the order of the folders."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.save(
        {"fc.weight": torch.ones(2, 512), "fc.bias": torch.ones(2)}, tmp_path / "resnet18.pth"
    )
    if file:
        (tmp_path / file).write_text(json.dumps(content))
    assert read_pretrained(str(tmp_path / "resnet18.pth"), {}).class_to_index == expected


@pytest.mark.parametrize("classes,is_other", [(12, True), (10, False)])
def test_nobody_knows_the_order_of_numbers(classes, is_other):
    """Folders of numbers are sorted as text, and the network may have been trained otherwise."""
    of_data = {name: label for label, name in enumerate(sorted(map(str, range(classes))))}
    assert are_numbers_sorted_as_text(of_data) == is_other
    assert not are_numbers_sorted_as_text({"cat": 0, "10": 1})
