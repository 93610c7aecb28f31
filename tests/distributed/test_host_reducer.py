"""Gradients that are sent while others are computed.

On two ranks that count as hosts of their own.
"""

import pytest
from conftest import ROOT, mpirun

STEPS = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from src.distributed.communicator import MpiCommunicator, connect
MpiCommunicator.hosts = property(lambda self: [f"h{{rank}}" for rank in range(self.size)])
from src.cli.start import prepare_rank
communicator = connect(True)
prepare_rank(communicator, threads=1)
import mindspore
import numpy as np
from conftest import make_config
from src.dataset.batches import Batch
from src.kernels.library import open_library
from src.models.create import create_model
from src.training.create_step import create_train_step
config = make_config(
    network={network!r}, block={block!r}, image_size=64, num_classes=7, dropout=0.0,
    gradient_compression={compression!r},
)
weights = []
for overlaps in (True, False):
    mindspore.set_seed(3)
    network = create_model(
        {network!r}, 7, {block!r}, image_size=64, dropout=0.0, kernels=open_library(1)
    )
    step = create_train_step(network, config, communicator)
    overlap = step.reducer._overlap
    if not overlaps:
        step.reducer._overlap = None
    random = np.random.default_rng(communicator.rank)
    for number in range(4):
        images = random.integers(0, 256, (4, 64, 64, 3), np.uint8)
        step([Batch(images, random.integers(0, 7, 4, np.int32))], 0.01, number)
    weights.append({{p.name: p.asnumpy().copy() for p in network.get_parameters()}})
    if overlaps:
        sent = sum(overlap._sizes[index] for bucket in overlap._plan for _, index in bucket)
        assert sent > 0.95 * sum(overlap._sizes), (sent, sum(overlap._sizes))
for name, array in weights[0].items():
    assert np.array_equal(array, weights[1][name]), name
    assert len(set(communicator.all_gather(array.tobytes()))) == 1, name
print("the same", communicator.rank)
"""


@pytest.mark.parametrize(
    "network,block,compression",
    [
        pytest.param("alexnet", "base", "none", marks=pytest.mark.extended),
        pytest.param("resnet18", "acb", "bfloat16", marks=pytest.mark.extended),
        pytest.param("resnext50_32x4d", "base", "none", marks=pytest.mark.extended),
    ],
)
def test_what_is_sent_early_gives_the_same_bits(kernels, network, block, compression, tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(
        STEPS.format(root=str(ROOT), network=network, block=block, compression=compression)
    )
    run = mpirun(2, script)
    assert run.status == 0 and run.out.count("the same") == 2, run
