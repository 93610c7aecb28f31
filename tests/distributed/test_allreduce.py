"""Means over hosts, and sixteen-bit forms; ranks here count as hosts of their own."""

import numpy as np
import pytest
from conftest import ROOT, mpirun

from src.distributed.allreduce import COMPRESSIONS

MEANS = """
import sys; sys.path.insert(0, {root!r})
import numpy as np
from mpi4py import MPI
from src.distributed.allreduce import HierarchicalAllReduce, make_buckets
world, groups = MPI.COMM_WORLD, {groups!r}
topology = HierarchicalAllReduce(MPI, world, groups)
sizes = [3, 700_001, 5, 300_000, 1, 262_144]
def draw(rank, size):
    return np.random.default_rng([rank, size]).normal(size=size).astype(np.float32)

every = [[draw(rank, size) for size in sizes] for rank in range(world.size)]
arrays, arrived = [array.copy() for array in every[world.rank]], []
pipeline = topology.pipeline()
for bucket in make_buckets([array.nbytes for array in arrays]):
    tensors = [arrays[index] for index in bucket]
    pipeline.add(tensors, None, lambda bucket=bucket: arrived.extend(bucket))
pipeline.finish()
assert sorted(arrived) == list(range(len(sizes))), arrived
for index, array in enumerate(arrays):
    exact = np.mean([of_rank[index] for of_rank in every], axis=0, dtype=np.float64)
    assert np.abs(array - exact).max() < 1e-6, (index, np.abs(array - exact).max())
    assert len(set(world.allgather(array.tobytes()))) == 1, index
print("agreed", world.rank)
"""


@pytest.mark.parametrize("groups", ["ab", "abc", "aabb", "aaab", "abab"])
def test_means_are_exact_and_the_same_bits_on_every_rank(groups, tmp_path):
    script = tmp_path / "means.py"
    script.write_text(MEANS.format(root=str(ROOT), groups=groups))
    run = mpirun(len(groups), script)
    assert run.status == 0 and run.out.count("agreed") == len(groups), run


def test_small_arrays_travel_together_and_large_ones_alone():
    from src.distributed.allreduce import BUCKET_BYTES, make_buckets

    small, large = BUCKET_BYTES // 4, BUCKET_BYTES
    assert make_buckets([small, large, small, small, small, 4, large]) == [
        [1],
        [0, 2, 3, 4],
        [6],
        [5],
    ]
    assert make_buckets([]) == []


def test_float16_is_ieee_754_half_precision():
    values = np.array(
        [0, -0.0, 1, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519, 6e-8, 2e-8, np.inf, -np.inf],
        np.float32,
    )
    coded = COMPRESSIONS["float16"].encode(values)
    assert coded.tolist() == values.astype(np.float16).view(np.uint16).tolist()
    assert COMPRESSIONS["float16"].decode(coded).tolist() == values.astype(np.float16).tolist()
    assert np.isinf(
        COMPRESSIONS["float16"].decode(
            COMPRESSIONS["float16"].encode(np.array([65520], np.float32))
        )
    ).all()


@pytest.mark.parametrize(
    "value, rounded",
    [
        (1.0, 1.0),
        (1 + 2**-8, 1.0),
        (1 + 3 * 2**-8, 1 + 2**-6),
        (1 + 2**-8 + 2**-20, 1 + 2**-7),
        (-3.1415927, -3.140625),
        (3e38, 3.00406e38),
        (1e-40, 9.1835e-41),
        (np.inf, np.inf),
        (-np.inf, -np.inf),
    ],
)
def test_bfloat16_keeps_eight_digits_ties_to_even(value, rounded):
    form = COMPRESSIONS["bfloat16"]
    assert form.decode(form.encode(np.array([value], np.float32)))[0] == pytest.approx(
        rounded, rel=1e-4
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_what_is_not_finite_stays_so(name):
    form = COMPRESSIONS[name]
    assert not np.isfinite(
        form.decode(form.encode(np.array([np.nan, -np.nan, np.inf], np.float32)))
    ).any()
