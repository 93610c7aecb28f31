"""A run on two hosts with random faults, compared with an undisturbed one.

Hosts are as in slow_links.py; needs root and Linux:

    python3 benchmarks/soak_hosts.py [--faults=20] [--epochs=600] [--seed=0]

scripts/launch.py --max_restarts starts it again each time. Faults: kill -9 of a rank or of mpirun
or of its daemon on the far host, a rank that is stopped (SIGSTOP), a link that is cut for 3
seconds, which is to be survived, or for 25. Prints how often it was started again, which epochs
were recorded, and whether both trainings end with the same bits.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts.rig import Rig, missing  # noqa: E402

from benchmarks.processes import mpirun_environment  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

_FAULTS = ("rank", "launcher", "daemon", "stopped", "short cut", "long cut")
_CUT_S = {"short cut": 3, "long cut": 25}
_STALL_S = 10
_PATIENCE_S = 240


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if missing():
        raise UserError(f"no hosts can be made here: {missing()}")
    with tempfile.TemporaryDirectory() as folder, Rig(folder, 2) as rig:
        whole, disturbed = Path(folder) / "whole", Path(folder) / "disturbed"
        if start(rig, options, whole, 0).wait():
            raise UserError("the undisturbed training failed")
        process, made = start(rig, options, disturbed, 10 * options.faults), {}
        draw = random.Random(options.seed)
        for _ in range(options.faults):
            wait_for_progress(process, disturbed, draw.uniform(2, 5))
            fault = draw.choice(_FAULTS)
            made[fault] = made.get(fault, 0) + 1
            print(
                f"soak_hosts fault={fault.replace(' ', '_')} after_epoch={epochs(disturbed)[-1]}",
                flush=True,
            )
            make(rig, fault, draw)
        status = process.wait()
        log = next(disturbed.glob("*/log.txt")).read_text()
        once = epochs(disturbed) == list(range(1, options.epochs + 1))
        print(
            f"soak_hosts epochs={options.epochs} faults={sum(made.values())} "
            f"restarts={log.count('restarts left)')} status={status} "
            f"every_epoch_once={once} bit_identical={weights(whole) == weights(disturbed)} "
            + " ".join(f"{name.replace(' ', '_')}={count}" for name, count in sorted(made.items()))
        )


def start(rig, options, output, restarts):
    """The training, writing to ``output``."""
    words = [
        "python3",
        "scripts/launch.py",
        "--hosts=h1:1,h2:1",
        f"--max_restarts={restarts}",
        "train.py",
        "--run_distribute=1",
        "--threads=1",
        "--config_path=digits",
        "--data_path=data/digits/val",
        "--run_eval=0",
        "--deploy=0",
        f"--output_path={output}",
        f"--max_epoch={options.epochs}",
        "--ckpt_interval=1000000",
        "--ckpt_interval_steps=50",
        f"--stall_timeout_s={_STALL_S}",
    ]
    return subprocess.Popen(
        rig.on("h1", *words, cwd=ROOT),
        env={**mpirun_environment(), **rig.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def epochs(output):
    """Those that the training has recorded."""
    files = list(output.glob("*/metrics.jsonl"))
    return (
        [json.loads(line)["epoch"] for line in files[0].read_text().splitlines()] if files else []
    )


def wait_for_progress(process, output, seconds):
    """Until the training has gone on for so long, counted from its next epoch."""
    before, deadline = epochs(output)[-1:], time.monotonic() + _PATIENCE_S
    while epochs(output)[-1:] == before:
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"the training does not go on: status {process.poll()}, epoch {before}")
        time.sleep(0.2)
    time.sleep(seconds)


def make(rig, fault, draw):
    if fault in _CUT_S:
        rig.link("h2", up=False)
        time.sleep(_CUT_S[fault])
        rig.link("h2", up=True)
        return
    name = {"rank": "train.py", "stopped": "train.py", "launcher": "mpirun", "daemon": "prted"}[
        fault
    ]
    host = {"launcher": "h1", "daemon": "h2"}.get(fault) or draw.choice(["h1", "h2"])
    # The first word of the command line, or of a script its second: mpirun's own command line names
    # train.py too.
    for process, words in rig.processes(host).items():
        if name in words.split()[1 if name == "train.py" else 0]:
            os.kill(process, signal.SIGSTOP if fault == "stopped" else signal.SIGKILL)


def weights(output):
    """{name: bytes} of the newest checkpoint."""
    from src.models.weight_files import read_weights

    arrays, _ = read_weights(next(output.glob("*/latest.ckpt")))
    return {
        name: array.tobytes()
        for name, array in arrays.items()
        if name not in ("metadata", "checksum")
    }


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
