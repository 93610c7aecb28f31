"""Run random hostile environments and check the invariants that hold for all of them.

`python3 tests/hostile/run.py [--cases=1000] [--seed=0] [--minutes=10] [--only=NUMBER]`.

Three quarters of the cases check properties of functions, and take milliseconds: pictures, weights
and folders of every kind, against Pillow, PyTorch and torchvision. The others run commands.

Prints a line for each failure, with how to repeat it, then cases and failures by kind. The exit
status is 1 if any failed.
"""

import argparse
import collections
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile.worlds import PROPERTIES, TINY, draw_world, invariants, words  # noqa: E402

# UCX, which MPI loads, waits half a minute if the clock jumps while it patches itself.
TIMEOUT_S = 240
CHECKED_PER_COMMAND = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10, help="no case begins later")
    parser.add_argument("--jobs", type=int, default=max(len(os.sched_getaffinity(0)), 1))
    parser.add_argument("--only", type=int, default=None, help="one case, with all that it prints")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    outcomes = Outcomes(options.seed)
    if options.only is not None and is_property(options.only):
        sys.exit(bool(outcomes.add(*check(options.seed, options.only))))
    if options.only is None:
        check_properties(options, ends, outcomes)
    with tempfile.TemporaryDirectory() as root:
        good = whole_world(Path(root))
        if options.only is not None:
            world, broken, status, out, err = run(options.seed, options.only, Path(root), good)
            print(world.command, out, err, f"status {status}", *broken, sep="\n")
            sys.exit(bool(broken))
        shared = set(Path("/dev/shm").glob("sm_segment*"))
        run_commands(options, ends, Path(root), good, outcomes)
        left = set(Path("/dev/shm").glob("sm_segment*")) - shared
    if left:
        print(f"FAILED shared memory is left behind: {', '.join(map(str, left))}")
    outcomes.summarise()
    sys.exit(bool(outcomes.failed.total() or left))


class Outcomes:
    """What came of all cases."""

    def __init__(self, seed):
        self.seed, self.tried, self.failed = seed, collections.Counter(), collections.Counter()

    def add(self, kind, number, broken, command=""):
        """Count a case, and print what is broken in it; returns that."""
        self.tried[kind] += 1
        self.failed[kind] += bool(broken)
        if broken:
            print(
                f"FAILED {kind} {number}: {'; '.join(broken)}\n    repeat: python3 "
                f"tests/hostile/run.py --seed={self.seed} --only={number}\n    {command[:400]}",
                flush=True,
            )
        return broken

    def summarise(self):
        for kind in sorted(self.tried):
            print(f"hostile kind={kind} cases={self.tried[kind]} failures={self.failed[kind]}")
        print(
            f"hostile seed={self.seed} cases={self.tried.total()} failures={self.failed.total()}",
            flush=True,
        )


def is_property(number):
    return number % CHECKED_PER_COMMAND != 0


def check_properties(options, ends, outcomes):
    numbers = filter(is_property, range(options.cases))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context) as pool:
        for checked in pool.map(partial(check, options.seed, ends=ends), numbers, chunksize=20):
            if checked is not None:
                outcomes.add(*checked)


def check(seed, number, ends=None):
    """(kind, number, what is broken) of a case that needs no command; None after the end."""
    if ends is not None and time.monotonic() > ends:
        return None
    random = np.random.default_rng([seed, number])
    prove = PROPERTIES[random.integers(len(PROPERTIES))]
    with tempfile.TemporaryDirectory() as folder:
        try:
            prove(random, Path(folder) / "world")
        except Exception as failure:
            last = traceback.extract_tb(failure.__traceback__)[-1]
            place = f"{last.filename}:{last.lineno}"
            return prove.__name__, number, [f"{type(failure).__name__} {failure} at {place}"]
    return prove.__name__, number, []


def run_commands(options, ends, root, good, outcomes):
    numbers = (number for number in range(options.cases) if not is_property(number))
    with ThreadPoolExecutor(options.jobs) as pool:
        for ran in pool.map(
            lambda n: run(options.seed, n, root, good) if time.monotonic() < ends else None, numbers
        ):
            if ran is not None:
                world, broken, *_ = ran
                outcomes.add(world.kind, world.folder.name, broken, world.command)


def environment(**changes):
    return {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **changes,
    }


def whole_world(root):
    """Data, an image and a checkpoint with which nothing is wrong."""
    data = ROOT / "data" / "digits" / "val"
    command = words(
        "python3",
        "train.py",
        f"--data_path={data}",
        f"--output_path={root}/good",
        *TINY,
        "--block=acb",
        "--max_steps=3",
    )
    subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment(XDG_CACHE_HOME=str(root)),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {
        "data": data,
        "image": next((data / "3").iterdir()),
        "checkpoint": next(root.glob("good/*/ckpt_0/*.ckpt")),
        "machine": machine_library(root),
    }


def machine_library(root):
    """The library of machine.c, or None without a compiler."""
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    library, source = root / "machine.so", ROOT / "tests" / "hostile" / "machine.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    return library


def run(seed, number, root, good):
    """(world, what is broken, status or None, output, errors) of one case."""
    folder = root / "worlds" / str(number)
    folder.mkdir(parents=True)
    world = draw_world(seed, number, folder, good)
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        # A killed mpirun leaves a folder in the temporary folder by which a later one of that
        # process number fails.
        process = subprocess.Popen(
            ["bash", "-c", world.command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env=environment(XDG_CACHE_HOME=str(root), TMPDIR=str(folder), **world.environment),
        )
        try:
            if world.signal_after is not None:
                number_of_signal, after = world.signal_after
                time.sleep(after)
                process.send_signal(number_of_signal)
                if number_of_signal == signal.SIGKILL:
                    kill_all(folder)
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
    broken = invariants(
        world,
        status,
        (folder / "stdout").read_text(errors="replace"),
        (folder / "stderr").read_text(errors="replace"),
    )
    still = running_in(folder)
    if still and status is not None:
        time.sleep(2)
        still = running_in(folder)
    if still:
        kill_all(folder)
        broken.append(f"{len(still)} processes are left running")
    out, err = (
        (folder / name).read_text(errors="replace")[-6000:] for name in ("stdout", "stderr")
    )
    shutil.rmtree(folder, ignore_errors=True)
    return world, broken, status, out, err


def running_in(folder):
    """Process numbers of what was started for ``folder``, by its environment."""
    mark, found = f"TMPDIR={folder}\0".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes() + b"\0":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill_all(folder):
    for process in running_in(folder):
        try:
            os.kill(process, signal.SIGKILL)
        except OSError:
            continue


if __name__ == "__main__":
    main()
