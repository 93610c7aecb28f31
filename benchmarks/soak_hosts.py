"""A run on two hosts with random faults, compared with an undisturbed one.

Both train at the same time, each on two hosts of its own. Hosts are as in slow_links.py; needs
root and Linux:

    python3 benchmarks/soak_hosts.py [--minutes=10] [--pause_s=5] [--seed=0]
        [--data_path=data/digits/val] [--config_path=digits] [--ckpt_interval=10]
        [--stall_timeout_s=10]

scripts/launch.py --max_restarts starts the disturbed run again. After faults that end the launcher
too, its command is given again, with --resume=auto. Faults: kill -9 of a rank, of mpirun, or of its
daemon on the far host; a rank that is stopped (SIGSTOP); SIGTERM; a full disk; a host that loses
its power for some seconds; a link that is cut for 3 seconds, which is to be survived, or for longer
than --stall_timeout_s. --pause_s: the mean time from a saved checkpoint to the next fault.

Prints each fault, how memory, open files and threads of the undisturbed rank 0 changed, and whether
both runs have the same bits: weights and optimizer state at the last step that both have saved, and
the recorded loss of each epoch before it.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts.rig import Rig, missing  # noqa: E402

from benchmarks.processes import mpirun_environment  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.runs.run_folder import checkpoint_position  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

_FAULTS = (
    "rank",
    "launcher",
    "daemon",
    "stopped",
    "sigterm",
    "full_disk",
    "lost_host",
    "short_cut",
    "long_cut",
)
_SHORT_CUT_S, _LOST_S, _FULL_S = 3, 5, 20
# The launcher continues without a host that is not back after half a minute.
_LONGER_THAN_THE_LIMIT_S = 5
_PATIENCE_S = 600
_MOST_EPOCHS = 100_000
_DISK_SIZE = "1g"
_SAMPLE_S = 5
_CHUNK = b"\0" * (1 << 20)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pause_s", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_path", default="data/digits/val")
    parser.add_argument("--config_path", default="digits")
    parser.add_argument("--ckpt_interval", type=int, default=10)
    parser.add_argument("--stall_timeout_s", type=int, default=10)
    options = parser.parse_args(arguments)
    if missing():
        raise UserError(f"no hosts can be made here: {missing()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with small_disk(folder / "disturbed"), Rig(folder, 4) as rig:
            soak(rig, folder, options)


def soak(rig, folder, options):
    whole = Run(rig, ("h3", "h4"), folder / "whole", options)
    disturbed = Run(rig, ("h1", "h2"), folder / "disturbed", options)
    draw, faults = random.Random(options.seed), Counter()
    disturbed.wait_for_checkpoint([])
    began, usages = time.monotonic(), []
    while time.monotonic() - began < 60 * options.minutes:
        pause(draw.expovariate(1 / options.pause_s), whole, usages)
        fault = draw.choice(_FAULTS)
        minutes = (time.monotonic() - began) / 60
        epoch = len(losses(disturbed.output))
        print(f"soak_hosts minute={minutes:.1f} epochs={epoch} fault={fault}", flush=True)
        make(rig, fault, draw, disturbed, options)
        faults[fault] += 1
        disturbed.wait_for_checkpoint(usages, whole)
    for run in (whole, disturbed):
        run.stop()
    fifths = [usages[(len(usages) - 1) * part // 5] for part in range(6)]
    print(
        "rank 0 while undisturbed, at the beginning and after each fifth: "
        + ", ".join(
            f"{mib:.0f} MiB {files} files {threads} threads" for mib, files, threads in fifths
        )
    )
    epoch, same_state = compare_states(whole.output, disturbed.output)
    # The epoch of the last common checkpoint may not have ended.
    recorded = [losses(run.output)[: epoch - 1] for run in (whole, disturbed)]
    same_losses = recorded[0] == recorded[1]
    for number, (one, other) in enumerate(zip_longest(*recorded)):
        if one != other:
            print(f"soak_hosts line={number + 1} undisturbed={one} disturbed={other}", flush=True)
    print(
        f"soak_hosts minutes={(time.monotonic() - began) / 60:.0f} faults={faults.total()} "
        f"restarts={disturbed.restarts()} starts={disturbed.starts} compared_epochs={epoch} "
        f"same_losses={same_losses} bit_identical={same_state} "
        f"memory_growth_mib={fifths[5][0] - fifths[1][0]:.1f} "
        f"open_files_growth={fifths[5][1] - fifths[1][1]} "
        f"threads_growth={fifths[5][2] - fifths[1][2]} "
        + " ".join(f"{name}={count}" for name, count in sorted(faults.items())),
        flush=True,
    )
    if not (same_state and same_losses):
        sys.exit(1)


@contextlib.contextmanager
def small_disk(folder):
    """A file system of its own at ``folder``, which a fault can fill."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_SIZE}", "tmpfs", folder], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Run:
    """A training on two hosts, started again whenever its launcher has ended."""

    def __init__(self, rig, hosts, output, options):
        self.rig, self.hosts, self.output, self.starts = rig, hosts, output, 0
        output.mkdir(exist_ok=True)
        self._words = [
            "python3",
            "scripts/launch.py",
            f"--hosts={hosts[0]}:1,{hosts[1]}:1",
            "--max_restarts=1000",
            "train.py",
            "--run_distribute=1",
            "--threads=1",
            f"--config_path={options.config_path}",
            f"--data_path={options.data_path}",
            "--run_eval=0",
            "--deploy=0",
            f"--output_path={output}",
            f"--max_epoch={_MOST_EPOCHS}",
            f"--ckpt_interval={options.ckpt_interval}",
            f"--keep_checkpoint_max={_MOST_EPOCHS}",
            "--ckpt_interval_steps=50",
            f"--stall_timeout_s={options.stall_timeout_s}",
        ]
        self._log = output.with_suffix(".log")
        self.start()

    def start(self):
        resume = ["--resume=auto"] if any(self.output.glob("*/latest.ckpt")) else []
        self.starts += 1
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(
                self.rig.on(self.hosts[0], *self._words, *resume, cwd=ROOT),
                env={**mpirun_environment(), **self.rig.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def send(self, number):
        """Send a signal to the launcher."""
        self._process.send_signal(number)

    def ended(self, patience_s=0):
        """Whether the launcher has ended, or does within ``patience_s``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        return self._process.returncode is not None

    def stop(self):
        self.send(signal.SIGTERM)
        self._process.wait()

    def restarts(self):
        """How often the launcher restarted the job."""
        return self._log.read_text(errors="replace").count("restarts left)")

    def ranks(self, host):
        """Process numbers of train.py on a host."""
        return [
            process
            for process, words in self.rig.processes(host).items()
            if "train.py" in words.split()[1:2]
        ]

    def wait_for_checkpoint(self, usages, watched=None):
        """Until the run has saved one from now on; it is started again where it has ended."""
        before, deadline = time.time(), time.monotonic() + _PATIENCE_S
        while not any(file.stat().st_mtime > before for file in self.output.glob("*/latest.ckpt")):
            if self.ended():
                if not any(self.output.glob("*/latest.ckpt")):
                    raise UserError(f"the training did not start: {self._log.read_text()}")
                self.start()
            if time.monotonic() > deadline:
                log = self._log.read_text(errors="replace")
                raise UserError(f"the training does not continue; its last lines: {log[-2000:]}")
            pause(1, watched, usages)


def pause(seconds, watched, usages):
    """Wait, and note what rank 0 of the watched run uses every few seconds."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if watched and time.monotonic() - (usages[-1].at if usages else 0) > _SAMPLE_S:
            usages.extend(filter(None, map(usage_of, watched.ranks(watched.hosts[0]))))
        time.sleep(min(left, 1))


class Usage(tuple):
    """(resident MiB, open files, threads) of a process, and when that was."""

    at = 0.0


def usage_of(process):
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        usage = Usage(
            (
                pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                len(os.listdir(f"/proc/{process}/fd")),
                len(os.listdir(f"/proc/{process}/task")),
            )
        )
    except OSError:
        return None
    usage.at = time.monotonic()
    return usage


def make(rig, fault, draw, run, options):
    """Do to the run what ``fault`` says, and take away what stands in its way afterwards."""
    near, far = run.hosts
    if fault in ("short_cut", "long_cut"):
        rig.link(far, up=False)
        longer = options.stall_timeout_s + _LONGER_THAN_THE_LIMIT_S
        time.sleep(_SHORT_CUT_S if fault == "short_cut" else longer)
        rig.link(far, up=True)
    elif fault == "lost_host":
        rig.power_off(far)
        time.sleep(_LOST_S)
        rig.power_on(far)
    elif fault == "full_disk":
        with filled(run.output / "filler"):
            run.ended(_FULL_S)
    elif fault == "sigterm":
        run.send(signal.SIGTERM)
        run.ended(_PATIENCE_S)
    elif fault in ("rank", "stopped"):
        for process in run.ranks(draw.choice(run.hosts)):
            os.kill(process, signal.SIGKILL if fault == "rank" else signal.SIGSTOP)
    else:
        host, name = (near, "mpirun") if fault == "launcher" else (far, "prted")
        for process, words in rig.processes(host).items():
            if name in words.split()[0]:
                os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def filled(file):
    """A disk without a free byte."""
    try:
        with open(file, "wb", buffering=0) as filler:
            while True:
                filler.write(_CHUNK)
    except OSError as failure:
        if failure.errno != errno.ENOSPC:
            raise
    try:
        yield
    finally:
        file.unlink()


def losses(output):
    """[(epoch, training loss)] that the run has recorded."""
    lines = [
        json.loads(line)
        for file in output.glob("*/metrics.jsonl")
        for line in file.read_text().splitlines()
    ]
    return [(line["epoch"], line["loss"]) for line in lines]


def compare_states(one, other):
    """The epoch of the last checkpoint that both runs have, and whether its bits are the same."""
    from src.models.weight_files import read_weights

    saved = [
        {file.name: file for file in output.glob("*/ckpt_0/*.ckpt")} for output in (one, other)
    ]
    last = max(map(Path, saved[0].keys() & saved[1].keys()), key=checkpoint_position)
    states = []
    for files in saved:
        arrays, metadata = read_weights(files[last.name])
        states.append(({name: array.tobytes() for name, array in arrays.items()}, metadata["step"]))
    return checkpoint_position(last)[0], states[0] == states[1]


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
