"""Losses against PyTorch's."""

import numpy as np
import pytest
from conftest import execute, make_config
from mindspore import Tensor

from src.training.losses import check_loss, create_loss
from src.utils.errors import UserError

LOGITS = np.random.default_rng(0).normal(0, 4, (6, 5)).astype(np.float32)
LOGITS[0, 0], LOGITS[1, 1] = 200, -200  # beyond what exp() takes in float32
LABELS = np.array([0, 1, 4, 4, 2, 0], np.int32)
MIXED = np.random.default_rng(1).dirichlet(np.ones(5), 6).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_binary_cross_entropy_is_pytorchs(smoothing, threshold, targets):
    torch = pytest.importorskip(
        "torch", reason="PyTorch, a development-only dependency, is not installed"
    )
    argument = "" if threshold is None else f"(threshold={threshold})"
    config = make_config(
        loss=f"binary_cross_entropy{argument}", label_smooth_factor=smoothing, num_classes=5
    )
    expected = np.eye(5)[targets] if targets.ndim == 1 else targets.astype(np.float64)
    # As with cross-entropy, label_smooth_factor is what the true class loses to the other four.
    spread = smoothing * 5 / 4
    expected = (1 - spread) * expected + spread / 5
    if threshold is not None:
        expected = (expected > threshold).astype(np.float64)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(expected)
    )
    ours = create_loss(config)(Tensor(LOGITS), Tensor(targets)).asnumpy()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_weighted_cross_entropy_is_pytorchs(smoothing, targets):
    """The sum of PyTorch's losses over the number of images."""
    torch = pytest.importorskip(
        "torch", reason="PyTorch, a development-only dependency, is not installed"
    )
    weights = [0.5, 2.0, 1.0, 0.25, 3.0]
    config = make_config(class_weights=weights, label_smooth_factor=smoothing, num_classes=5)
    expected = np.eye(5)[targets] if targets.ndim == 1 else targets.astype(np.float64)
    spread = smoothing * 5 / 4
    expected = (1 - spread) * expected + spread / 5
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS, dtype=torch.float64),
        torch.tensor(expected),
        torch.tensor(weights, dtype=torch.float64),
        reduction="sum",
    )
    ours = create_loss(config)(Tensor(LOGITS), Tensor(targets)).asnumpy()
    assert float(ours) == pytest.approx(float(theirs) / 6, rel=1e-5)


def test_wrong_losses_are_refused():
    with pytest.raises(UserError, match="binary_cross_entropy"):
        check_loss(make_config(loss="binary_crossentropy"))
    with pytest.raises(UserError, match="threshold"):
        create_loss(make_config(loss="binary_cross_entropy(threshold=2)"))


@pytest.mark.slow
def test_mixed_labels_train_with_binary_cross_entropy(tmp_path):
    """Mixup, CutMix and this loss, as in Wightman et al.: the accuracy rises far above chance."""
    run = execute(
        [
            "python3",
            "train.py",
            "--config_path=digits",
            "--loss=binary_cross_entropy(threshold=0.2)",
            "--augmentations=[crop, mixup(alpha=0.1), cutmix]",
            "--label_smooth_factor=0",
            "--max_epoch=4",
            f"--output_path={tmp_path}",
        ]
    )
    assert run.status == 0, run
    top1 = [
        float(line.split("acc=")[1].split("%")[0])
        for line in run.out.splitlines()
        if "acc=" in line
    ]
    assert top1 and max(top1) > 30, run


@pytest.mark.parametrize("threshold,verdict", [(0.01, "right"), (0.95, "wrong")])
def test_a_threshold_that_makes_all_targets_the_same_is_refused(threshold, verdict):
    """With 10 classes and 0.1 spread over the others, targets are 0.0111 and 0.9."""
    config = make_config(
        num_classes=10, label_smooth_factor=0.1, loss=f"binary_cross_entropy(threshold={threshold})"
    )
    with pytest.raises(UserError, match=f"targets are 0.0111 and 0.9, so every class.*{verdict}"):
        create_loss(config)
