"""The batch that fits, and the learning rate that fits the batch."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, execute, make_config

from src.dataset.image_set import ImageSet
from src.dataset.splits import TrainingData
from src.distributed.communicator import Communicator
from src.models.create import create_model
from src.models.networks import NETWORKS
from src.training import resolve as fitting
from src.training.job import batch_messages
from src.training.resolve import (
    auto_batch_size,
    check_progressive_size,
    resolve_data,
    training_bytes,
)
from src.utils.errors import UserError
from src.utils.machine import available_bytes, peak_bytes


class Ranks(Communicator):
    """As many equal ranks as a test wants."""

    def __init__(self, size):
        super().__init__()
        self.size = self.local_size = size

    def gather(self, value):
        return [value] * self.size


@pytest.mark.parametrize(
    "images,ranks,asked,found",
    [
        (10_000, 1, 64, 64),
        (10_000, 4, 64, 64),  # enough of everything
        (320, 2, 64, 32),  # ten steps of 32
        (60, 1, 64, 8),
        (60, 2, 64, 16),  # ten steps would leave a rank fewer than eight images
        (5, 1, 64, 4),
        (3, 2, 64, 2),  # there are not more
        (10_000, 3, 64, 63),  # ranks that do not divide it
    ],
)
def test_batch_makes_ten_steps_of_at_least_eight_images_a_rank(
    images, ranks, asked, found, monkeypatch
):
    monkeypatch.setattr(fitting, "available_bytes", lambda: 1e15)
    config = make_config(network="resnet18", global_batch_size=asked, fit_batch=1)
    assert auto_batch_size(config, images, Ranks(ranks)).global_batch_size == found


def test_batch_fits_the_memory(monkeypatch):
    config = make_config(network="resnet50", global_batch_size=256, fit_batch=1)
    for gigabytes in (3, 8, 30):
        monkeypatch.setattr(fitting, "available_bytes", lambda bytes=gigabytes * 1e9: bytes)
        batch = auto_batch_size(config, 10**6, Ranks(2)).global_batch_size
        assert 2 * training_bytes(config, batch // 2) <= 0.6 * gigabytes * 1e9 or batch == 2
        assert batch == 256 or 2 * training_bytes(config, batch) > 0.6 * gigabytes * 1e9


def test_learning_rate_is_in_proportion_and_the_result_is_not_fitted_again():
    config = make_config(
        network="resnet18", per_batch_size=16, lr=0.1, eta_min=0.01, lr_batch_size=32
    )
    fitted = auto_batch_size(config, 1000, Ranks(4))
    assert (fitted.lr, fitted.eta_min) == (pytest.approx(0.2), pytest.approx(0.02))
    assert (fitted.lr_batch_size, fitted.global_batch_size) == (0, 64)
    assert auto_batch_size(fitted, 1000, Ranks(4)) == fitted
    assert auto_batch_size(make_config(lr=0.3), 1000, Ranks(4)).lr == 0.3


def test_the_batch_of_several_ranks_is_recorded():
    """Half as many images were in a step when one process repeated the run's config.yaml."""
    config = make_config(per_batch_size=8, accumulation_steps=2)
    assert auto_batch_size(config, 1000, Ranks(3)).global_batch_size == 48
    assert auto_batch_size(config, 1000, Ranks(1)).global_batch_size == 0


def test_available_memory_is_what_the_system_says():
    assert 1e8 < available_bytes() < 1e15


def test_peak_is_of_this_process_alone():
    held = bytearray(300_000_000)
    child = subprocess.run(
        [sys.executable, "-c", "from src.utils.machine import peak_bytes; print(peak_bytes())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert peak_bytes() > len(held) > 10 * int(child.stdout) > 0


@pytest.mark.extended
def test_estimated_memory_is_enough_for_what_a_training_takes():
    command = [
        sys.executable,
        "benchmarks/train_step.py",
        "--network=resnet18",
        "--per_batch_size=16",
        "--steps=2",
    ]
    for kernels in ("onednn", "mindspore"):
        line = subprocess.run(
            [*command, f"--kernels={kernels}", "--threads=1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout
        peak = float(line.rpartition("peak_rss_mib=")[2]) * 2**20
        assert peak < training_bytes(make_config(network="resnet18"), 16) < 2.5 * peak, line


def test_every_network_says_what_it_costs():
    assert all(network.size is not None for network in NETWORKS.values())


@pytest.mark.parametrize("kernels", ["auto", "mindspore"])
def test_a_batch_norm_over_one_value_is_refused_before_the_first_step(
    image_root, tmp_path, kernels
):
    """PyTorch refuses it too. Here it ended with status 0 and variances that were not finite."""
    flags = (
        f"--data_path={image_root}/train",
        "--network=resnet18",
        "--image_size=32",
        "--per_batch_size=1",
        f"--kernels={kernels}",
        f"--output_path={tmp_path}/out",
    )
    run = execute(["python3", "train.py", *flags])
    assert run.status == 2 and len(run.error_lines) == 1, run
    assert "a single value per channel" in run.error_lines[0]
    assert not (tmp_path / "out").exists()


def test_a_batch_that_ranks_do_not_divide_is_told_and_not_refused():
    """64 images on 3 ranks: each takes 21."""
    before = make_config(fit_batch=1, global_batch_size=64)
    after = make_config(global_batch_size=63)
    assert batch_messages(before, after, 3) == [
        "warning: fit_batch: 63 images per step instead of 64"
    ]


def resolved_weights(counts=(6, 3, 1), **keys):
    labels = np.repeat([0, 1, 2], counts).astype(np.int32)
    images = ImageSet({"a": 0, "b": 1, "c": 2}, labels, pixels=np.zeros((10, 4, 4, 3), np.uint8))
    return resolve_data(make_config(**keys), TrainingData(images, None)).class_weights


def test_balanced_class_weights_are_scikit_learns():
    """Images / (classes * images of the class), whose mean over the images is 1."""
    assert resolved_weights() == "none"
    found = resolved_weights(class_weights="balanced")
    assert found == pytest.approx([10 / (3 * 6), 10 / (3 * 3), 10 / 3], abs=1e-6)
    # Resolved numbers, as a resumed run has them, stay as they are.
    assert resolved_weights(class_weights=found) == found
    assert resolved_weights((4, 0, 6), class_weights="balanced") == pytest.approx(
        [10 / 8, 1, 10 / 12], abs=1e-6
    )
    given = resolved_weights(class_weights="1, 1, 5")
    assert given == pytest.approx([10 / 14, 10 / 14, 50 / 14], abs=1e-6)


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"class_weights": "1,2"}, "has 2 numbers; the data has 3 classes"),
        ({"class_weights": "balanced", "loss": "binary_cross_entropy"}, "has none"),
        ({"class_weights": "balanced", "sampling": "balanced"}, "choose one"),
    ],
)
def test_class_weights_that_mean_nothing_are_refused(keys, words):
    with pytest.raises(UserError, match=words):
        resolved_weights(**keys)


@pytest.mark.parametrize("value", ["balance", "0,1", "-1", "nan,1", ""])
def test_class_weights_that_are_none_are_refused(value):
    with pytest.raises(UserError, match="class_weights"):
        make_config(class_weights=value)


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"progressive_size": 64}, "must be below image_size=64"),
        ({"progressive_size": 24}, "too small for resnet18, which needs 32"),
        ({"network": "vgg16_cifar", "progressive_size": 48}, "images of one size only"),
        ({"max_epoch": 3}, "--max_epoch=4"),
        ({"input_pipeline": "mindspore"}, "--input_pipeline=own"),
        ({"teacher": "x"}, "cannot be combined"),
        ({}, None),
    ],
)
def test_images_that_cannot_grow_are_refused(keys, words):
    config = make_config(
        **{"network": "resnet18", "image_size": 64, "progressive_size": 32, "max_epoch": 4, **keys}
    )
    if words is None:
        check_progressive_size(config)
        return
    with pytest.raises(UserError, match=words):
        check_progressive_size(config)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_say_whether_they_are_built_for_one_size(name):
    network = NETWORKS[name]
    built = [
        create_model(name, num_classes=10, image_size=size)
        for size in (network.image_size, 2 * network.image_size)
    ]
    described = [
        (
            [type(cell) for _, cell in model.cells_and_names()],
            [parameter.shape for parameter in model.get_parameters()],
        )
        for model in built
    ]
    assert (described[0] != described[1]) == network.has_fixed_size


def test_a_run_that_finds_validation_images_records_that_it_evaluates():
    """Its config.yaml repeated it without evaluation."""
    config = resolve_data(make_config(data_path="digits", val_split="auto"), digits(True))
    assert (config.val_split, config.run_eval) == (0.0, True)
    config = resolve_data(make_config(data_path="digits", val_split="0.1"), digits(True))
    assert (config.val_split, config.run_eval) == (0.1, False)
    assert not resolve_data(make_config(data_path="digits"), digits(False)).run_eval


def digits(validates):
    images = ImageSet({"a": 0, "b": 1}, np.array([0, 1], np.int32), pixels=np.zeros((2, 8, 8, 3)))
    return TrainingData(images, images if validates else None)
