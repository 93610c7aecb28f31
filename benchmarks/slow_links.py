"""Training over slow links compared with PyTorch's, in turn.

On hosts made of network namespaces (tests/hosts/rig.py; needs root, Linux):

    python3 benchmarks/slow_links.py [--cases=alexnet:8,resnext50_32x4d:16]
        [--links=none,10gbit,1gbit,200mbit] [--hosts=2]
        [--compressions=none,bfloat16] [--steps=4] [--pytorch=1]

One rank of one core on each host. The whole step on random images: images/s, seconds that a step
waits for the reduction, MiB that a host sends in a step next to the 2 (n - 1) / n of the gradients
that a ring needs, and PyTorch's DistributedDataParallel over gloo on the same hosts, eager, its
better layout for 2 cores. --cases=exchange reduces AlexNet's gradients alone, and --ranks_per_host
counts there. Needs `bash scripts/setup.sh --parity` for PyTorch's side; --pytorch=0 leaves it out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts.rig import Rig, missing  # noqa: E402

from benchmarks.processes import mpirun_environment  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

_PORT = 29501
_COPIES = 5


def main(arguments):
    options = parse(arguments)
    if options.worker:
        exchange()
        return
    if missing():
        raise UserError(f"no hosts can be made here: {missing()}")
    with tempfile.TemporaryDirectory() as folder, Rig(folder, options.hosts) as rig:
        for link in options.links.split(","):
            rig.limit(None if link == "none" else link)
            for case in options.cases.split(","):
                if case == "exchange":
                    print(
                        f"slow_links link={link} hosts={options.hosts} "
                        f"ranks_per_host={options.ranks_per_host} "
                        + on_hosts(
                            rig,
                            options.hosts,
                            options.ranks_per_host,
                            __file__,
                            "--worker=exchange",
                        ),
                        flush=True,
                    )
                else:
                    compare(rig, options, link, case)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="alexnet:8,resnext50_32x4d:16")
    parser.add_argument("--links", default="none,10gbit,1gbit,200mbit")
    parser.add_argument("--compressions", default="none,bfloat16")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks_per_host", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pytorch", type=int, default=1)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def compare(rig, options, link, case):
    """Print a line for each form in which gradients travel."""
    name, _, batch = case.partition(":")
    network, _, block = name.partition("+")
    block = block or "base"
    theirs = pytorch_rate(rig, options, network, block, batch) if options.pytorch else None
    for compression in options.compressions.split(","):
        printed = on_hosts(
            rig,
            options.hosts,
            1,
            "benchmarks/train_step.py",
            f"--network={network}",
            f"--block={block}",
            f"--per_batch_size={batch}",
            f"--steps={options.steps}",
            f"--gradient_compression={compression}",
            "--threads=1",
        )
        found = dict(re.findall(r"(\w+)=(\S+)", printed))
        rate = float(found["images_per_second"])
        comparison = (
            f" pytorch_images_per_second={theirs:.2f} ratio={rate / theirs:.2f}" if theirs else ""
        )
        print(
            f"slow_links link={link} hosts={options.hosts} network={network} block={block} "
            f"per_batch_size={batch} "
            f"compression={compression} images_per_second={rate:.2f} "
            f"step_s={int(batch) * options.hosts / rate:.3f} "
            f"waiting_s={found['allreduce_s']} sent_mib={found['sent_mib']} "
            f"ring_mib={ring_mib(network, block, options.hosts, compression):.1f}{comparison}",
            flush=True,
        )


def pytorch_rate(rig, options, network, block, batch):
    """Images/s of the better layout."""
    return max(
        json.loads(
            on_hosts(
                rig,
                options.hosts,
                1,
                "benchmarks/compare_pytorch.py",
                "--worker=pytorch_train",
                f"--network={network}",
                f"--block={block}",
                f"--batch={batch}",
                f"--layout={layout}",
                f"--steps={options.steps}",
                f"--ranks={options.hosts}",
                "--address=h1",
                f"--port={_PORT}",
            )
        )["images_per_second"]
        for layout in ("nchw", "channels_last")
    )


def ring_mib(network, block, hosts, compression):
    """What a ring sends in a step from each host, headers left out."""
    code = (
        f"from src.models.create import create_model; "
        f"print(sum(p.size for p in create_model('{network}', 1000, '{block}').trainable_params()))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return (
        int(finished.stdout.split()[-1])
        * (4 if compression == "none" else 2)
        * 2
        * (hosts - 1)
        / hosts
        / 2**20
    )


def on_hosts(rig, hosts, ranks_per_host, *words):
    """The last line that the Python script ``words`` prints on all hosts, each rank on a core."""
    places = ",".join(f"h{number}:{ranks_per_host}" for number in range(1, hosts + 1))
    pinned = f'exec taskset -c $((OMPI_COMM_WORLD_RANK % {os.cpu_count()})) "$0" "$@"'
    command = rig.on(
        "h1",
        "mpirun",
        "-n",
        str(hosts * ranks_per_host),
        "--host",
        places,
        "--bind-to",
        "none",
        "-x",
        "PATH",
        "-x",
        "GLOO_SOCKET_IFNAME=eth0",
        "bash",
        "-c",
        pinned,
        sys.executable,
        *words,
        cwd=ROOT,
    )
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**mpirun_environment(), **rig.environment}
    )
    if finished.returncode or not finished.stdout.strip():
        raise UserError(
            f"'{' '.join(command)}' ended with status {finished.returncode}; its error is above"
        )
    return finished.stdout.splitlines()[-1]


def exchange():
    """On each rank.

    AlexNet's gradients as the step reduces them, next to MPI's Allreduce of one tensor after the
    other.
    """
    from benchmarks.allreduce import gradient_shapes
    from benchmarks.timing import medians_in_turn
    from benchmarks.train_step import sent_bytes
    from src.cli.start import prepare_rank
    from src.distributed.communicator import connect

    communicator = connect(True)
    prepare_rank(communicator)
    import numpy as np
    from mpi4py import MPI

    gradients = [np.ones(shape, np.float32) for shape in gradient_shapes("alexnet")]

    def ours():
        communicator.barrier()
        communicator.all_reduce_mean_(gradients)

    def in_turn():
        communicator.barrier()
        for gradient in gradients:
            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, gradient)

    before = sent_bytes()
    ours()
    sent = sent_bytes() - before
    seconds = medians_in_turn({"ours": ours, "in_turn": in_turn}, _COPIES)
    if communicator.is_root:
        print(
            f"mib={sum(gradient.nbytes for gradient in gradients) / 2**20:.1f} "
            f"sent_mib={sent / 2**20:.1f} "
            f"exchange_s={seconds['ours']:.3f} allreduce_in_turn_s={seconds['in_turn']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
