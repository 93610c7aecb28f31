"""Times the tutorial: from a clean clone to a served network, on real photographs.

`python3 benchmarks/first_hour.py [--epochs=100] [--setup=1] [--image_size=224]`.

Clones this checkout, sets it up, and follows docs/tutorial.md, with a network that starts from
random weights. The photos are crops of four of scikit-image's photographs, 38 of each. Prints for
each stage its minutes and its longest silence: seconds without any output on a terminal. At the
end the same for all of it. --setup=0 uses the present environment. Needs
`python3 -m pip install --no-deps scikit-image`.
"""

import argparse
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.photographs import write_crops  # noqa: E402
from src.cli.run import run_process  # noqa: E402
from src.utils.errors import UserError  # noqa: E402

_CLASSES = ("astronaut", "chelsea", "coffee", "rocket")
_PHOTOS = 38


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--setup", type=int, default=1)
    parser.add_argument("--image_size", type=int, default=224)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        photos = write_crops(home / "photos", _CLASSES, train=_PHOTOS, val=2) / "train"
        found = [stage(*one) for one in stages(home, photos, options)]
    print_line("all", sum(seconds for seconds, _ in found), max(silence for _, silence in found))


def stages(home, photos, options):
    """(name, folder, command, whether to stop it at its first answer) of each stage in turn."""
    program = home / "program"
    enter = "source .venv/bin/activate && " if options.setup else ""
    if options.setup:
        setup = "bash scripts/setup.sh --onnx --serve"
        yield "set-up", home, f"git clone -q {ROOT} program && cd program && {setup}", False
    else:
        subprocess.run(["git", "clone", "-q", ROOT, program], check=True)
        if (ROOT / ".venv").is_dir():
            (program / ".venv").symlink_to(ROOT / ".venv")
    data = f"--config_path=finetune --data_path={photos} --network=resnet18 --freeze_epochs=0"
    data += f" --image_size={options.image_size}"
    preview = f"scripts/preview_dataset.py {data} --result_path=preview.png"
    yield "look", program, f"{enter}python3 {preview}", False
    train = f"train.py {data} --max_epoch={options.epochs}"
    words = f"{enter}python3 {train} --dry_run=1 && python3 {train} --ranks=auto"
    yield "train", program, words, False
    (run,) = (program / "outputs").iterdir()
    checkpoint = f"--checkpoint_file_path={run}/best.ckpt"
    yield "report", program, f"{enter}python3 report.py {run}", False
    export = f"{enter}python3 export.py {checkpoint} --file_format=ONNX --quantize=int8"
    yield "export", program, export, False
    yield "first answer", program, f"{enter}exec python3 serve.py {checkpoint} --port=0", True


def stage(name, folder, command, is_server):
    """Run a stage. Returns (seconds, longest silence in seconds).

    Raises:
        UserError: if it fails, with the end of what it printed.
    """
    terminal, its_end = pty.openpty()
    started = last = time.perf_counter()
    environment = {**os.environ, "TERM": "xterm"}
    # run_process blocks signals, which processes inherit.
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=its_end,
        stderr=its_end,
    )
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.close(its_end)
    silence, text = 0.0, ""
    while part := read(terminal):
        now = time.perf_counter()
        silence, last = max(silence, now - last), now
        text = text[-5000:] + part
        address = re.search(r"http://[\d.:]+/", text) if is_server else None
        if address:
            try:
                ask(address[0], folder)
            finally:
                process.terminate()
            is_server = False
    status = process.wait()
    os.close(terminal)
    silence = max(silence, time.perf_counter() - last)
    if status:
        raise UserError(f"{name}: '{command}' ended with status {status}: {text[-1000:]}")
    seconds = time.perf_counter() - started
    print_line(name, seconds, silence)
    return seconds, silence


def read(terminal):
    """What the terminal shows next, or "" when everybody has left it."""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:
        return ""


def ask(address, folder):
    """Let the server classify one of the photos."""
    photo = next((folder.parent / "photos/val").rglob("*.jpg"))
    with urllib.request.urlopen(f"{address}predict", photo.read_bytes()) as answer:
        if b"predictions" not in answer.read():
            raise UserError("the server does not answer with predictions")


def print_line(name, seconds, silence):
    print(
        f"first_hour stage={name.replace(' ', '_')} minutes={seconds / 60:.2f} "
        f"longest_silence_s={silence:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
