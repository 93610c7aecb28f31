"""Reduction of real gradient sets compared with raw MPI and MindSpore's MCCL:

    python3 benchmarks/allreduce.py [--networks=resnext50_32x4d,alexnet,resnet18+acb] [--ranks=2,4]
        [--repeats=10] [--mccl=1]

Each network's gradients, tensor by tensor as the training step reduces them, against one
MPI_Allreduce of one buffer of the same size, and with --mccl=1 against MindSpore's AllReduce of
that buffer on CPU (it wants a scheduler process and is started so). Medians, the first calls left
out; rates are bytes of gradients over seconds. No mean is computed on the raw sides.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import last_line, mpirun_words  # noqa: E402
from benchmarks.timing import median_seconds  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.cli.start import prepare_rank  # noqa: E402
from src.distributed.launcher import launched_rank  # noqa: E402

_MCCL_TIMEOUT_S = 240


def main(arguments):
    options = parse(arguments)
    if options.worker:
        WORKERS[options.worker](options)
        return
    for network in options.networks.split(","):
        for ranks in map(int, options.ranks.split(",")):
            found = json.loads(last_line(mpirun_words(ranks, *worker("ours", options, network))))
            if options.mccl:
                found["mccl_s"] = measure_mccl(options, network, ranks)
            print(
                f"allreduce network={network} ranks={ranks} tensors={found['tensors']} "
                f"mib={found['mib']:.1f} "
                f"ours_s={found['ours_s']:.4f} raw_mpi_s={found['raw_s']:.4f} "
                f"of_raw_rate={found['raw_s'] / found['ours_s']:.2f}"
                + (
                    f" mccl_s={found['mccl_s']:.4f} "
                    f"times_mccl={found['mccl_s'] / found['ours_s']:.1f}"
                    if options.mccl
                    else ""
                ),
                flush=True,
            )


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="resnext50_32x4d,alexnet,resnet18+acb")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--mccl", type=int, default=1)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def worker(name, options, network):
    return [__file__, f"--worker={name}", f"--networks={network}", f"--repeats={options.repeats}"]


def measure_mccl(options, network, ranks):
    """Seconds of MindSpore's AllReduce: ``ranks`` workers and a scheduler of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MS_WORKER_NUM": str(ranks),
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": str(port),
        "GLOG_v": "3",
    }
    roles = [("MS_SCHED", 0)] + [("MS_WORKER", rank) for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, *worker("mccl", options, network)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **common, "MS_ROLE": role, "MS_NODE_ID": str(rank)},
        )
        for role, rank in roles
    ]
    try:
        printed = [process.communicate(timeout=_MCCL_TIMEOUT_S)[0] for process in processes[1:]]
        return json.loads(printed[0].splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return float("nan")
    finally:
        for process in processes:
            process.kill()


def gradient_shapes(name):
    """Shapes of the trainable parameters of ``name`` or ``name+acb``, 1000 classes."""
    from src.models.create import create_model

    network, _, block = name.partition("+")
    return [
        parameter.shape
        for parameter in create_model(network, 1000, block or "base").trainable_params()
    ]


def ours(options):
    """On each rank: our reduction and MPI's of one buffer; rank 0 prints."""
    from src.distributed.communicator import connect

    communicator = connect(True)
    prepare_rank(communicator)
    import numpy as np
    from mpi4py import MPI

    gradients = [np.ones(shape, np.float32) for shape in gradient_shapes(options.networks)]
    buffer = np.ones(sum(gradient.size for gradient in gradients), np.float32)
    ours_s = median_seconds(
        lambda: communicator.all_reduce_mean_(gradients), options.repeats, communicator.barrier
    )
    raw_s = median_seconds(
        lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, buffer),
        options.repeats,
        communicator.barrier,
    )
    if communicator.is_root:
        print(
            json.dumps(
                {
                    "ours_s": ours_s,
                    "raw_s": raw_s,
                    "tensors": len(gradients),
                    "mib": buffer.nbytes / 2**20,
                }
            )
        )


def mccl(options):
    """A worker of MindSpore's own communication, or its scheduler, which init() never leaves."""
    from src.utils.device import prepare_process

    prepare_process()
    import mindspore
    import numpy as np
    from mindspore import Tensor, nn, ops

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("CPU")
    mindspore.communication.init()

    class Reduce(nn.Cell):
        def __init__(self):
            super().__init__()
            self.reduce = ops.AllReduce()

        def construct(self, x):
            return self.reduce(x)

    count = sum(int(np.prod(shape)) for shape in gradient_shapes(options.networks))
    cell, buffer = Reduce(), Tensor(np.ones(count, np.float32))
    print(json.dumps(median_seconds(lambda: cell(buffer).asnumpy(), min(options.repeats, 3))))


WORKERS = {"ours": ours, "mccl": mccl}


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]), launched_rank())
