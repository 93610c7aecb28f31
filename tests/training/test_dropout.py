"""Dropout masks: a function of seed, step and sample."""

import numpy as np
import pytest
from conftest import make_config
from mindspore import Tensor

from src.models.create import create_model
from src.training.step import DropoutMasks


def masks(rank=0, size=1, **keys):
    return DropoutMasks(1000, make_config(dropout=0.35, global_batch_size=12, **keys), rank, size)


def test_a_sample_has_the_same_mask_on_every_number_of_ranks():
    whole = masks()(5, 0).asnumpy()
    for size in (2, 3, 4):
        for rank in range(size):
            assert np.array_equal(masks(rank, size)(5, 0).asnumpy(), whole[rank::size])
    parts = masks(1, 2, accumulation_steps=3)
    assert np.array_equal(
        np.concatenate([parts(5, part).asnumpy() for part in range(3)]), whole[1::2]
    )


def test_masks_keep_the_share_they_should_and_differ():
    whole = masks()(5, 0).asnumpy()
    # 12,000 draws: the standard deviation of the mean is 0.0044.
    assert whole.mean() == pytest.approx(0.65, abs=0.02) and set(np.unique(whole)) == {0, 1}
    others = [masks()(6, 0).asnumpy(), masks(seed=2)(5, 0).asnumpy(), whole[::-1]]
    for other in others:
        assert (other == whole).mean() < 0.7


def test_alexnet_drops_what_the_mask_says_and_scales_the_rest():
    network = create_model("alexnet", 4, image_size=64, dropout=0.5).set_train(True)
    images = Tensor(np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32))
    kept = np.ones((2, network.dropout_width), np.uint8)
    kept[:, network.flat :] = 0
    # With every hidden unit dropped only biases are left of the second half.
    second = (
        np.maximum(network.fc2.bias.asnumpy(), 0) @ network.classifier.weight.asnumpy().T
        + network.classifier.bias.asnumpy()
    )
    assert np.allclose(network(images, Tensor(kept)).asnumpy(), second, atol=1e-6)
    all_kept = network(images, Tensor(np.ones_like(kept))).asnumpy()
    assert not np.allclose(all_kept, second, atol=1e-3)


def test_dropout_rests_in_evaluation():
    network = create_model("alexnet", 4, image_size=64, dropout=0.5)
    images = Tensor(np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32))
    first, second = (network.set_train(False)(images).asnumpy() for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(network.set_train(True)(images).asnumpy(), first)
