"""Time from `python3 train.py` to the end of its first step.

`python3 benchmarks/start_up.py [--networks=NAME:SIZE,...] [--repeats=3]`.

Each training (8 digits of SIZE x SIZE per step) runs with the graph cache off and with the graph in
it. Medians of what was spent on imports, the data set, building the network, compiling and the rest
of the first step, next to a later step.
"""

import argparse
import atexit
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.cli.run import run_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

_STEPS = 3


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="cifar_quick:32,alexnet:224,resnext50_32x4d:224")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    for case in options.networks.split(","):
        network, size = case.split(":")
        with tempfile.TemporaryDirectory() as folder:
            _started(network, size, 1, folder)  # fills the graph cache and the disk's
            runs = {cached: [] for cached in (0, 1)}
            for _ in range(options.repeats):
                for cached in runs:
                    runs[cached].append(_started(network, size, cached, folder))
        for cached, found in runs.items():
            median = {name: statistics.median(run[name] for run in found) for name in found[0]}
            print(
                f"start_up network={network} image_size={size} compile_cache={cached} "
                + " ".join(f"{name}={value:.2f}" for name, value in median.items()),
                flush=True,
            )


def _started(network, size, cached, folder):
    """Seconds of each part of one training, run in a process of its own."""
    words = [
        sys.executable,
        __file__,
        "--watch",
        repr(time.time()),
        "--config_path=digits",
        f"--network={network}",
        f"--image_size={size}",
        f"--eval_resize={size}",
        "--per_batch_size=8",
        "--global_batch_size=0",
        f"--max_steps={_STEPS}",
        "--run_eval=0",
        f"--output_path={folder}/out",
        f"--compile_cache={cached}",
    ]
    finished = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": folder}
    )
    if finished.returncode:
        raise UserError(f"'{' '.join(words[3:])}' ended with status {finished.returncode}")
    return json.loads(finished.stdout.splitlines()[-1])


def watch(started, arguments):
    """Run train.py's main in this process with a clock at its parts.

    Prints the seconds of each as JSON.
    """
    import train
    from src.cli import start
    from src.cli.run import run

    clock, prepare = _Clock(started), start.prepare_rank

    def prepare_and_place_clocks(*arguments):
        prepare(*arguments)
        # Only now: these import MindSpore.
        from mindspore.nn import cell

        from src.training import job, resolve, step

        clock.time(resolve, "open_training_data", "data_s")
        clock.time(job, "create_network", "build_s")
        clock.time(cell._cell_graph_executor, "compile", "compile_s")
        clock.time(step.TrainStep, "__init__", "build_s")
        clock.time(step.TrainStep, "__call__", "step")

    start.prepare_rank = prepare_and_place_clocks
    sys.argv = [str(ROOT / "train.py"), *arguments]
    atexit.register(lambda: print(json.dumps(clock.parts())))
    run(train.main, train.__doc__, distributed=True)


class _Clock:
    def __init__(self, started):
        self._started, self._spent, self._ends = started, {}, {}

    def time(self, owner, name, part):
        """Let each call of ``owner.name`` count towards ``part``."""
        function = getattr(owner, name)

        def timed(*words, **more):
            began = time.time()
            try:
                return function(*words, **more)
            finally:
                self._spent.setdefault(part, []).append(time.time() - began)
                self._ends.setdefault(part, time.time() - self._started)

        setattr(owner, name, timed)

    def parts(self):
        spent = {part: sum(seconds) for part, seconds in self._spent.items() if part != "step"}
        first, total = self._spent["step"][0], self._ends["step"]
        imports = total - first - spent["data_s"] - spent["build_s"]
        return {
            "until_first_step_s": total,
            "import_s": imports,
            "data_s": spent["data_s"],
            "build_s": spent["build_s"],
            "compile_s": spent["compile_s"],
            "rest_of_first_step_s": first - spent["compile_s"],
            "later_step_s": min(self._spent["step"][1:]),
        }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watch(float(sys.argv[2]), sys.argv[3:])
    else:
        run_process(lambda signals: main(sys.argv[1:]))
