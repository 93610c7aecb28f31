"""Reducers on real processes.

The device's own collectives between graphs give the means that MPI gives.
"""

import socket
import subprocess
import sys

import pytest
from conftest import ROOT, user_environment

# On CPU MindSpore's collectives are MCCL, which wants a scheduler process.
WORKER = """
import os, sys, time; sys.path.insert(0, {root!r})
from src.utils.device import prepare_process
prepare_process()
import mindspore, numpy as np
from mindspore import Parameter, Tensor
mindspore.set_context(mode=mindspore.GRAPH_MODE)
mindspore.set_device("CPU")
mindspore.communication.init()
from src.distributed.communicator import Communicator
from src.distributed.device_reducers import DeviceReducer
from src.cli.config import Config

class Two(Communicator):
    rank, size = mindspore.communication.get_rank(), 2

reducer = DeviceReducer(Config(), Two())
gradients = [
    [Tensor(np.full(shape, 2.0 * Two.rank + part, np.float32)) for shape in ((3,), (2, 5))]
    for part in (1, 2)
]
total = reducer.add(reducer.add(None, gradients[0]), gradients[1])
statistic = Parameter(Tensor(np.array([1.0 + Two.rank], np.float32)), name="moving_mean")
means, _ = reducer.reduce(total, 2, [statistic])
# over ranks 0 and 1 and parts 1 and 2: mean of 1, 2, 3, 4
assert all(np.allclose(mean.asnumpy(), 2.5) for mean in means), means
assert [mean.shape for mean in means] == [(3,), (2, 5)]
assert np.allclose(statistic.asnumpy(), 1.5), statistic
print("reduced", flush=True)
# MindSpore's own end crashes at times; the commands leave it out too (src/cli/run.py). The other
# worker may still be reading.
time.sleep(1)
os._exit(0)
"""


@pytest.mark.slow
def test_collectives_of_a_device_give_the_means_over_ranks_and_parts(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = user_environment(
        MS_SCHED_HOST="127.0.0.1", MS_SCHED_PORT=str(port), MS_WORKER_NUM="2"
    )

    def begin(role, number=0):
        return subprocess.Popen(
            [sys.executable, tmp_path / "worker.py"],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, "MS_ROLE": role, "MS_NODE_ID": str(number)},
        )

    processes = [begin("MS_SCHED"), begin("MS_WORKER", 0), begin("MS_WORKER", 1)]
    try:
        for worker in processes[1:]:
            out, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0 and "reduced" in out, out[-2000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
