"""Kill a run at random moments, and compare its end with that of a run that nobody disturbed:

    python3 benchmarks/soak.py [--epochs=1000] [--kills=8] [--ranks=2] [--output=FOLDER]

The network is cifar_quick with ACB, on a tiny data set. kill -9 hits a rank, or mpirun and all
ranks, and --resume=auto continues. Prints whether the last weights, optimizer state and metrics
have the same bits, and how memory and open files of the ranks changed in the undisturbed run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import mpirun_environment, mpirun_words  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", default="")
    options = parser.parse_args(arguments)
    folder = Path(options.output or tempfile.mkdtemp(prefix="soak_"))
    write_tiny_set(folder / "images")
    started = time.monotonic()
    samples, trained_s = run_undisturbed(options, folder)
    kills, fallen = run_with_kills(options, folder, trained_s)
    same = outcome(folder / "alone") == outcome(folder / "killed")
    # In the last moments curves.png is drawn, which loads a library.
    samples = samples[:-10] or samples
    fifths = [samples[(len(samples) - 1) * part // 5] for part in range(6)]
    print(
        f"rank 0 while undisturbed, at the beginning and after each fifth of {trained_s:.0f} s: "
        + ", ".join(f"{mib:.0f} MiB {files} files" for mib, files in fifths)
    )
    print(
        f"soak epochs={options.epochs} ranks={options.ranks} kills={kills} during_a_save={fallen} "
        f"bit_identical={same} "
        f"memory_growth_mib={fifths[5][0] - fifths[1][0]:.1f} "
        f"open_files_growth={fifths[5][1] - fifths[1][1]} "
        f"seconds={time.monotonic() - started:.0f}"
    )
    if not options.output:
        shutil.rmtree(folder)
    if not same:
        sys.exit(1)


def write_tiny_set(folder):
    """Sixteen of the bundled digits in two classes."""
    for split, count in (("train", 8), ("val", 4)):
        for name in ("3", "8"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for file in sorted((ROOT / "data" / "digits" / split / name).iterdir())[:count]:
                shutil.copy(file, folder / split / name)


def begin(options, folder, name, *more):
    words = [
        *mpirun_words(options.ranks, "train.py", "--run_distribute=1"),
        "--config_path=digits",
        f"--data_path={folder}/images/train",
        f"--output_path={folder}/{name}",
        f"--max_epoch={options.epochs}",
        "--global_batch_size=8",
        "--lr=0.01",
        "--flip_probability=0.5",
        "--ckpt_interval=10",
        "--ckpt_interval_steps=7",
        "--eval_interval=10",
        "--log_interval=1000",
        *more,
    ]
    # A killed mpirun leaves a folder there by which a later one with the same process number fails
    # to start.
    environment = {**mpirun_environment(), "TMPDIR": str(folder)}
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def run_undisturbed(options, folder):
    """[(MiB, open files) of rank 0] a few times a second, and the seconds it took.

    From the first checkpoint to the end.
    """
    process, samples, trained_s = begin(options, folder, "alone"), [], 0
    if progresses(process, folder / "alone"):
        began = time.monotonic()
        while process.poll() is None:
            samples += filter(None, map(usage, ranks_of(process)[:1]))
            time.sleep(0.2)
        trained_s = time.monotonic() - began
    if process.returncode or not samples:
        raise UserError(
            f"the undisturbed training ended with status {process.returncode}; see "
            f"{folder}/alone.log"
        )
    return samples, trained_s


def run_with_kills(options, folder, trained_s):
    """Kill and resume until the training ends; (kills, those that left a half-written file).

    The moments are drawn so that all kills together fit into the time that the undisturbed training
    took after its start, with some to spare for a machine that is faster now.
    """
    draw, kills, fallen = random.Random(0), 0, 0
    process = begin(options, folder, "killed")
    while process.poll() is None:
        if kills == options.kills or not progresses(process, folder / "killed"):
            process.wait()
            continue
        time.sleep(draw.uniform(0, trained_s / (options.kills + 2)))
        if process.poll() is None:
            kill(process, draw)
            kills += 1
            fallen += any((folder / "killed").glob("*/ckpt_0/.*.partial.*"))
            process = begin(options, folder, "killed", "--resume=auto")
    if process.returncode:
        raise UserError(
            f"the resumed training ended with status {process.returncode}; see {folder}/killed.log"
        )
    return kills, fallen


def progresses(process, output):
    """Wait until the training has written a checkpoint since it began; False if it ended first."""
    began = time.time_ns()
    while process.poll() is None:
        if any(
            file.stat().st_mtime_ns > began
            for file in output.glob("*/latest.ckpt")
            if file.exists()
        ):
            return True
        time.sleep(0.01)
    return False


def kill(process, draw):
    """kill -9 of one rank, whereupon mpirun ends the rest, or of all of them at once."""
    victims = ranks_of(process)
    if victims and draw.random() < 0.5:
        os.kill(draw.choice(victims), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        for pid in victims:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    process.wait()


def ranks_of(process):
    """Process numbers of the ranks of an mpirun."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(word) for word in found.stdout.split()]


def usage(pid):
    """(resident MiB, open files) of a process, or None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


def outcome(output):
    """What a run left that must not depend on how often it was killed."""
    from src.models.weight_files import read_weights

    folder = max(output.iterdir())
    arrays, metadata = read_weights(folder / "latest.ckpt")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {
            key: value
            for key, value in line.items()
            if key not in ("images_per_second", "rank_seconds")
        }
        for line in lines
    ]
    return (
        {name: array.tobytes() for name, array in arrays.items()},
        metadata["step"],
        metadata["best_top1"],
        metrics,
    )


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
