"""Feed the parsers of .mindir, .onnx and .hdf5, which are other people's C++, with damaged files:

    python3 tests/hostile/parsers.py [--files=2000] [--seed=0]

Each file is loaded by a process of its own, so that a crash is seen and counted. Prints per format how many were refused in one
line, loaded all the same, ended in another kind of error (a defect of ours), crashed (theirs), or did not end. The exit status is 1
after a defect of ours; README's SECURITY says what follows from crashes.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
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
    options = parser.parse_args()
    prepare_process()
    defects = 0
    with tempfile.TemporaryDirectory() as folder:
        for suffix, (whole, load) in make_files(Path(folder)).items():
            draw, counts, signals = random.Random(f"{options.seed} {suffix}"), collections.Counter(), collections.Counter()
            for number in range(options.files):
                file = Path(folder) / f"damaged{suffix}"
                file.write_bytes(damaged(draw, whole))
                ended = in_child(lambda load=load, file=file: load(file))
                if ended < 0:
                    signals[signal.Signals(-ended).name] += 1
                counts[ended] += 1
                if ended == OTHER:
                    print(f"FAILED {suffix} number {number}", flush=True)
            crashed = sum(count for ended, count in counts.items() if ended < 0)
            print(f"parsers format={suffix} files={options.files} refused={counts[REFUSED]} loaded={counts[LOADED]} "
                  f"defects={counts[OTHER]} crashed={crashed} {dict(signals) or ''}".rstrip(), flush=True)
            defects += counts[OTHER]
    sys.exit(bool(defects))


def make_files(folder):
    """{suffix: (content of a whole file, function that loads one)}."""
    import h5py
    import numpy as np
    from mindspore import Tensor, float32

    from src.inference.engines import NetworkEngine, exported_metadata, guarded, load_mindir
    from src.inference.onnx_engine import OnnxEngine, export_quietly, write_onnx
    from src.models.build import build_model
    from src.models.formats import read_weights
    from src.utils.config import load_config

    config = load_config({"data_path": "x", "image_size": "32"})
    export_quietly(build_model("cifar_quick", 10).set_train(False), Tensor(shape=[None, 3, 32, 32], dtype=float32), folder / "a.mindir", "MINDIR")
    write_onnx(build_model("cifar_quick", 10).set_train(False), folder / "a.onnx", {"config": {}}, 32)
    with h5py.File(folder / "a.hdf5", "w") as file:
        for parameter in build_model("cifar_quick", 10).get_parameters():
            file.create_dataset(parameter.name, data=parameter.asnumpy())
    images = np.zeros((1, 32, 32, 3), np.uint8)
    loads = {".mindir": lambda file: guarded(NetworkEngine(load_mindir(file), config), file)(images),
             ".onnx": lambda file: (exported_metadata(file), guarded(OnnxEngine(file, config), file)(images)),
             ".hdf5": read_weights}
    return {suffix: ((folder / f"a{suffix}").read_bytes(), load) for suffix, load in loads.items()}


def damaged(draw, whole):
    """Cut off, bytes changed (mostly near the beginning, where names and sizes are), or a part repeated."""
    content = bytearray(whole)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(content[:draw.randrange(len(content))])
    if kind == 1:
        start = draw.randrange(len(content))
        content[start:start] = content[start:start + draw.randint(1, 200)]
        return bytes(content)
    for _ in range(draw.choice([1, 1, 5, 50])):
        place = draw.randrange(len(content) if kind == 2 else min(4000, len(content)))
        content[place] = draw.randrange(256)
    return bytes(content)


def in_child(load):
    """REFUSED, LOADED, OTHER, or minus the number of the signal that ended the process; -SIGALRM if it did not end."""
    from src.utils.errors import UserError
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        signal.alarm(TIMEOUT_S)
        try:
            load()
            os._exit(LOADED)
        except UserError:
            os._exit(REFUSED)
        except BaseException:
            os._exit(OTHER)
    deadline = time.monotonic() + 2 * TIMEOUT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


if __name__ == "__main__":
    main()
