"""Feed the parsers of .mindir, .onnx and .hdf5, which are other people's C++, with damaged files:

    python3 tests/hostile/parsers.py [--files=2000] [--seed=0] [--jobs=CORES]

Each file is loaded by a process of its own, so that a crash is seen and counted. Prints per format
how many were refused in one line, loaded all the same, ended in another kind of error (a defect of
ours), crashed (theirs), or did not end. The exit status is 1 after a defect of ours;
docs/troubleshooting.md says what follows from crashes.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from src.utils.device import prepare_process  # noqa: E402

TIMEOUT_S = 20
REFUSED, LOADED, OTHER = 10, 11, 12


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    prepare_process()
    defects = 0
    with tempfile.TemporaryDirectory() as folder:
        for suffix, (whole, load) in make_files(Path(folder)).items():
            draw = random.Random(f"{options.seed} {suffix}")
            ends = load_all(
                options.files,
                options.jobs,
                load,
                Path(folder),
                suffix,
                lambda draw=draw, whole=whole: damaged(draw, whole),
            )
            counts = collections.Counter(ends)
            signals = collections.Counter(signal.Signals(-end).name for end in ends if end < 0)
            for number in (number for number, end in enumerate(ends) if end == OTHER):
                print(f"FAILED {suffix} number {number}", flush=True)
            crashed = sum(count for ended, count in counts.items() if ended < 0)
            print(
                f"parsers format={suffix} files={options.files} refused={counts[REFUSED]} "
                f"loaded={counts[LOADED]} "
                f"defects={counts[OTHER]} crashed={crashed} {dict(signals) or ''}".rstrip(),
                flush=True,
            )
            defects += counts[OTHER]
    sys.exit(bool(defects))


def make_files(folder):
    """{suffix: (content of a whole file, function that loads one)}."""
    import h5py
    import numpy as np
    from mindspore import Tensor, float32

    from src.cli.recipes import load_config
    from src.inference.backends import exported_metadata, naming_file
    from src.inference.mindspore_backend import MindSporeBackend, load_mindir
    from src.inference.onnx import export_quietly, write_onnx
    from src.inference.onnx_backend import OnnxBackend
    from src.models.create import create_model
    from src.models.weight_files import read_weights

    config = load_config({"data_path": "x", "image_size": "32"})
    export_quietly(
        create_model("cifar_quick", 10).set_train(False),
        Tensor(shape=[None, 3, 32, 32], dtype=float32),
        folder / "a.mindir",
        "MINDIR",
    )
    metadata = {"config": config.model_dump(mode="json"), "class_to_index": None}
    write_onnx(create_model("cifar_quick", 10).set_train(False), folder / "a.onnx", metadata, 32)
    with h5py.File(folder / "a.hdf5", "w") as file:
        for parameter in create_model("cifar_quick", 10).get_parameters():
            file.create_dataset(parameter.name, data=parameter.asnumpy())
    images = np.zeros((1, 32, 32, 3), np.uint8)
    loads = {
        ".mindir": lambda file: naming_file(MindSporeBackend(load_mindir(file), config), file)(
            images
        ),
        ".onnx": lambda file: (
            exported_metadata(file),
            naming_file(OnnxBackend(file, config), file)(images),
        ),
        ".hdf5": read_weights,
    }
    return {suffix: ((folder / f"a{suffix}").read_bytes(), load) for suffix, load in loads.items()}


def damaged(draw, whole):
    """``content`` cut off, with bytes changed, or with a part repeated.

    Most changed bytes are near the beginning, where names and sizes are.
    """
    content = bytearray(whole)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(content[: draw.randrange(len(content))])
    if kind == 1:
        start = draw.randrange(len(content))
        content[start:start] = content[start : start + draw.randint(1, 200)]
        return bytes(content)
    for _ in range(draw.choice([1, 1, 5, 50])):
        place = draw.randrange(len(content) if kind == 2 else min(4000, len(content)))
        content[place] = draw.randrange(256)
    return bytes(content)


def load_all(count, jobs, load, folder, suffix, make):
    """How loading each of ``count`` damaged files ended.

    REFUSED, LOADED, OTHER, or minus the number of the signal.
    """
    ends, running = [0] * count, {}
    for number in range(count):
        file = folder / f"damaged{number}{suffix}"
        file.write_bytes(make())
        running[start_child(load, file)] = number
        while len(running) >= (jobs if number + 1 < count else 1):
            child, status = os.wait()
            ended = running.pop(child)
            ends[ended] = os.waitstatus_to_exitcode(status)
            (folder / f"damaged{ended}{suffix}").unlink()
    return ends


def start_child(load, file):
    """Start a process that loads ``file`` and ends with what came of it; its number."""
    from src.utils.errors import UserError

    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        # By the system, whatever the process is doing.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIMEOUT_S)
        try:
            load(file)
            os._exit(LOADED)
        except UserError:
            os._exit(REFUSED)
        except BaseException:
            os._exit(OTHER)
    return child


if __name__ == "__main__":
    main()
