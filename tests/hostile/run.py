"""Run random hostile environments and check the invariants that hold for all of them.

`python3 tests/hostile/run.py [--cases=500] [--seed=0] [--minutes=10] [--only=NUMBER]`.

Prints a line for each failure, with how to repeat it, then cases and failures by kind. The exit
status is 1 if any failed.
"""

import argparse
import collections
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile.worlds import TINY, draw_world, invariants, words  # noqa: E402

TIMEOUT_S = 90


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10, help="no case begins later")
    parser.add_argument("--jobs", type=int, default=max(len(os.sched_getaffinity(0)), 1))
    parser.add_argument("--only", type=int, default=None, help="one case, with all that it prints")
    options = parser.parse_args()
    tried, failed = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as root:
        good = whole_world(Path(root))
        if options.only is not None:
            world, broken, status, out, err = run(options.seed, options.only, Path(root), good)
            print(world.command, out, err, f"status {status}", *broken, sep="\n")
            sys.exit(bool(broken))
        ends = time.monotonic() + 60 * options.minutes
        shared = set(Path("/dev/shm").glob("sm_segment*"))
        with ThreadPoolExecutor(options.jobs) as pool:
            numbers = range(options.cases)
            for world, broken, *_ in pool.map(
                lambda n: (
                    run(options.seed, n, Path(root), good)
                    if time.monotonic() < ends
                    else (None, [])
                ),
                numbers,
            ):
                if world is None:
                    continue
                tried[world.kind] += 1
                failed[world.kind] += bool(broken)
                if broken:
                    number = world.folder.name
                    print(
                        f"FAILED {world.kind} {number}: {'; '.join(broken)}\n    repeat: python3 "
                        "tests/hostile/run.py "
                        f"--seed={options.seed} --only={number}\n    {world.command[:400]}",
                        flush=True,
                    )
        left = set(Path("/dev/shm").glob("sm_segment*")) - shared
        if left:
            print(f"FAILED shared memory is left behind: {', '.join(map(str, left))}")
    for kind in sorted(tried):
        print(f"hostile kind={kind} cases={tried[kind]} failures={failed[kind]}")
    print(
        f"hostile seed={options.seed} cases={sum(tried.values())} failures={sum(failed.values())}",
        flush=True,
    )
    sys.exit(bool(sum(failed.values()) or left))


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
    }


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
