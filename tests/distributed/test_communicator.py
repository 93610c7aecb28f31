"""How ranks talk, with real ranks."""

import sys

import numpy as np
import pytest
from conftest import ROOT, mpirun

from src.distributed.communicator import Communicator, connect
from src.utils.errors import UserError

RANKS_AGREE = """
import sys; sys.path.insert(0, {root!r})
import numpy as np
from src.distributed.communicator import connect
c = connect(True)
big = np.full((600, 1000), c.rank, np.float32)
small = [
    np.arange(4, dtype=np.float32) * (c.rank + 1),
    np.full((2, 3), c.rank, np.float32),
    np.array(c.rank, np.float32),
]
c.all_reduce_mean_([small[0], big, small[1], small[2]])
mean = (c.size - 1) / 2
for array in (big, small[1], small[2]):
    assert np.allclose(array, mean), (big[0, 0], small)
assert np.allclose(small[0], np.arange(4) * (c.size + 1) / 2), small[0]
assert c.all_reduce_sum([1, c.rank]).tolist() == [c.size, sum(range(c.size))]
weights = np.full(5, c.rank, np.float32)
c.broadcast_([weights])
assert (weights == 0).all()
assert c.all_gather(c.rank) == list(range(c.size)) and c.broadcast_object(c.rank) == 0
c.barrier()
print("agreed", c.rank)
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree(ranks, tmp_path):
    script = tmp_path / "agree.py"
    script.write_text(RANKS_AGREE.format(root=str(ROOT)))
    run = mpirun(ranks, script)
    assert run.status == 0, run
    assert run.out.count("agreed") == ranks, run


def test_alone_every_operation_is_the_identity():
    alone = Communicator()
    array = np.arange(3, dtype=np.float32)
    alone.all_reduce_mean_([array])
    alone.broadcast_([array])
    assert (
        array.tolist() == [0, 1, 2]
        and alone.all_reduce_sum([2, 3]).tolist() == [2, 3]
        and alone.all_gather("x") == ["x"]
    )


def test_distribution_without_mpirun_says_how_to_start(monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="needs mpirun"):
        connect(True)


def test_mpirun_without_distribution_is_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run_distribute=0"):
        connect(False)


def test_importing_starts_no_mpi():
    assert "mpi4py.MPI" not in sys.modules


COMPRESSED = """
import sys; sys.path.insert(0, {root!r})
import numpy as np
from src.distributed.communicator import connect
from src.distributed.allreduce import COMPRESSIONS
c = connect(True)
for form, digits in (("float16", 11), ("bfloat16", 8)):
    draws = [np.random.default_rng(rank).normal(size=300001) for rank in range(c.size)]
    all_ranks = [draw.astype(np.float32) for draw in draws]
    big, small = all_ranks[c.rank].copy(), all_ranks[c.rank][:7].reshape(7, 1).copy()
    c.all_reduce_mean_([big, small], COMPRESSIONS[form])
    mean = np.mean(all_ranks, axis=0)
    # Each of the values added, and their mean, was rounded to that many binary digits.
    bound = 2.0 ** -digits * (np.mean(np.abs(all_ranks), axis=0) + np.abs(mean)) * 1.01
    assert (np.abs(big - mean) <= bound).all(), form
    assert (np.abs(small[:, 0] - mean[:7]) <= bound[:7]).all(), form
    assert len({{array.tobytes() for array in c.all_gather(big)}}) == 1
    broken = np.array([1, np.inf, np.nan] if c.rank else [1, 1, 1], np.float32)
    c.all_reduce_mean_([broken], COMPRESSIONS[form])
    assert broken[0] == 1 and not np.isfinite(broken[1:]).any(), (form, broken)
print("agreed", c.rank)
"""


def test_compressed_means_are_the_same_bits_on_every_rank_and_as_exact_as_their_digits(tmp_path):
    script = tmp_path / "compressed.py"
    script.write_text(COMPRESSED.format(root=str(ROOT)))
    run = mpirun(3, script)
    assert run.status == 0 and run.out.count("agreed") == 3, run
