"""Dropout masks: a function of seed, step and sample."""

import numpy as np
import pytest
from conftest import make_config
from mindspore import Tensor

from src.dataset.batches import Batch
from src.distributed.communicator import Communicator
from src.models.create import create_model, create_network
from src.models.weights import copy_weights
from src.training.create_step import create_train_step
from src.training.step import DropoutMasks
from src.utils.errors import UserError


def masks(rank=0, size=1, **keys):
    return DropoutMasks([0.35] * 1000, make_config(global_batch_size=12, **keys), rank, size)


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
    kept = np.ones((2, len(network.drop_probabilities)), np.uint8)
    kept[:, network.flat :] = 0
    # With every hidden unit dropped only biases are left of the second half.
    second = (
        np.maximum(network.fc2.bias.asnumpy(), 0) @ network.classifier.weight.asnumpy().T
        + network.classifier.bias.asnumpy()
    )
    assert np.allclose(network(images, Tensor(kept)).asnumpy(), second, atol=1e-6)
    all_kept = network(images, Tensor(np.ones_like(kept))).asnumpy()
    assert not np.allclose(all_kept, second, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet56_cifar", "wrn16_8_cifar"])
def test_stochastic_depth_leaves_branches_out_and_scales_the_rest(name):
    """As a network whose branches end in these factors: 0, or 1 / (1 - probability)."""
    images = Tensor(np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32))
    network = create_model(name, 4, stochastic_depth=0.5).set_train(True)
    probabilities = network.drop_probabilities
    # timm's rule: linear, from 0 for the first block to the given one for the last.
    assert np.allclose(np.diff(probabilities), 0.5 / (len(probabilities) - 1))
    assert (probabilities[0], probabilities[-1]) == (0, 0.5)

    def scaled(last):
        """Logits with the last branch scaled by ``last`` and the others by what they keep."""
        plain = create_model(name, 4).set_train(True)
        ends = [cell for path, cell in plain.cells_and_names() if path.endswith("conv2")]
        factors = [*(1 / (1 - p) for p in probabilities[:-1]), last]
        copy_weights(network, plain)
        for end, factor in zip(ends, factors):
            for parameter in end.get_parameters():
                # Without a batch norm at its end, the last convolution itself is scaled.
                if parameter.name.endswith(("gamma", "beta") if "56" in name else "weight"):
                    parameter.set_data(Tensor(parameter.asnumpy() * np.float32(factor)))
        return plain(images).asnumpy()

    mask = np.ones((4, len(probabilities)), np.uint8)
    mask[1:3, -1] = 0
    found, kept, left_out = network(images, Tensor(mask)).asnumpy(), scaled(2.0), scaled(0.0)
    # In wide networks a batch norm follows, whose statistics are of all four images.
    if "56" in name:
        assert np.allclose(found[[0, 3]], kept[[0, 3]], rtol=1e-4, atol=1e-4)
        assert np.allclose(found[1:3], left_out[1:3], rtol=1e-4, atol=1e-4)
    mask[:, -1] = 0
    assert np.allclose(network(images, Tensor(mask)).asnumpy(), left_out, rtol=1e-4, atol=1e-4)
    assert not np.allclose(kept, left_out, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "keys", [{"network": "resnet18", "stochastic_depth": 0.9}, {"network": "mobilenet_v2"}]
)
def test_nothing_is_dropped_while_the_backbone_is_frozen(keys):
    """The loss is that of a network that never drops anything."""
    losses = []
    batch = Batch(
        np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8),
        np.arange(4, dtype=np.int32),
    )
    for kept in ({}, {"stochastic_depth": 0.0, "dropout": 0.0}):
        config = make_config(
            **{"image_size": 32, "num_classes": 4, "global_batch_size": 4, **keys, **kept}
        )
        network = create_network(config, None)
        assert any(network.drop_probabilities) == (not kept)
        step = create_train_step(network, config, Communicator(), None)
        step.optimizer.backbone_frozen = True
        losses.append(step([batch], 0.0, 0).loss)
    assert losses[0] == losses[1]


def test_stochastic_depth_needs_residual_branches():
    with pytest.raises(UserError, match="stochastic_depth=0.5: alexnet cannot leave out branches"):
        create_model("alexnet", 4, image_size=64, dropout=0.5, stochastic_depth=0.5)


def test_dropout_rests_in_evaluation():
    network = create_model("alexnet", 4, image_size=64, dropout=0.5)
    images = Tensor(np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32))
    first, second = (network.set_train(False)(images).asnumpy() for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(network.set_train(True)(images).asnumpy(), first)
