"""Means between hosts: every number of ranks on every number of hosts, with ranks of this machine that count as hosts of their own."""

import pytest
from conftest import ROOT, mpirun

MEANS = """
import sys; sys.path.insert(0, {root!r})
import numpy as np
from mpi4py import MPI
from src.parallel.exchange import Exchange, buckets
world, groups = MPI.COMM_WORLD, {groups!r}
exchange = Exchange(MPI, world, groups)
sizes = [3, 700_001, 5, 300_000, 1, 262_144]
every = [[np.random.default_rng([rank, size]).normal(size=size).astype(np.float32) for size in sizes] for rank in range(world.size)]
arrays, arrived = [array.copy() for array in every[world.rank]], []
stream = exchange.stream()
for bucket in buckets([array.nbytes for array in arrays]):
    stream.add([arrays[index] for index in bucket], None, lambda bucket=bucket: arrived.extend(bucket))
stream.finish()
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
    from src.parallel.exchange import PACK_BELOW_BYTES, buckets
    small, large = PACK_BELOW_BYTES // 4, PACK_BELOW_BYTES
    assert buckets([small, large, small, small, small, 4, large]) == [[1], [0, 2, 3, 4], [6], [5]]
    assert buckets([]) == []
