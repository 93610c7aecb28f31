"""Peak memory is bounded by the images in flight, as docs/troubleshooting.md says."""

import os
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
from conftest import ROOT, Started, only_run, user_environment
from PIL import Image

PIXELS, THREADS = 24_000_000, 2
# 200 MB for the encoded file, for what allocators keep, and for how two runs differ anyway.
BOUND_MB = THREADS * PIXELS * 12 / 1e6 + 200
TINY = ("--network=cifar_quick", "--image_size=32", "--per_batch_size=4", "--max_epoch=1")

pytestmark = pytest.mark.extended


def write_images(root, size):
    """Six JPEGs of one class, and six PNGs with transparency, which take the long way."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 4), np.uint8)
    for name, suffix, mode in (("ant", ".jpg", "RGB"), ("bee", ".png", "RGBA")):
        (root / name).mkdir(parents=True)
        first = root / name / f"0{suffix}"
        Image.fromarray(noise, "RGBA").resize(size).convert(mode).save(first, compress_level=1)
        for number in range(1, 6):
            os.link(first, root / name / f"{number}{suffix}")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small images in small/, images of 24 megapixels in large/, and a run on the small ones."""
    folder = tmp_path_factory.mktemp("memory")
    write_images(folder / "small", (60, 40))
    write_images(folder / "large", (6000, 4000))
    peak_mb(["train.py", f"--data_path={folder}/small", f"--output_path={folder}/run", *TINY])
    return folder


def peak_mb(words):
    """Peak resident memory of a command in MB."""
    code = (
        "import resource, subprocess, sys; status = subprocess.run(sys.argv[1:]).returncode; "
        "print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, "python3", *map(str, words)],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    status, kilobytes = finished.stdout.splitlines()[-1].split()
    assert status == "0", (words, finished.stderr)
    return int(kilobytes) / 1024


@pytest.mark.parametrize("command", ["train", "eval", "predict", "preview"])
def test_peak_memory_is_that_of_the_images_in_flight(command, folder, tmp_path):
    weights = f"--checkpoint_file_path={only_run(folder / 'run')}/latest.ckpt"
    peaks = []
    for data in (folder / "small", folder / "large"):
        words = {
            "train": ["train.py", f"--output_path={tmp_path}/out", *TINY],
            "eval": ["eval.py", weights],
            "predict": ["predict.py", weights, data],
            "preview": ["scripts/preview_dataset.py", f"--result_path={tmp_path}/preview.png"],
        }[command]
        images = [] if command == "predict" else [f"--data_path={data}"]
        peaks.append(peak_mb([*words, *images, f"--num_parallel_workers={THREADS}"]))
    assert peaks[1] - peaks[0] < BOUND_MB, peaks


def test_a_server_reads_as_many_images_at_once_as_it_has_cores(folder, tmp_path):
    pytest.importorskip("uvicorn")
    weights = f"--checkpoint_file_path={only_run(folder / 'run')}/latest.ckpt"
    server = Started(["python3", "serve.py", weights, "--port=0", "--threads=2"], tmp_path)
    try:
        server.wait_for_text(" on http")
        address = server.output().split(" on ")[1].split()[0] + "predict"

        def post(name):
            body = (folder / name).read_bytes()
            with urllib.request.urlopen(urllib.request.Request(address, body)) as answer:
                assert answer.status == 200

        post("small/bee/0.png")
        before = peak_of(server.process.pid)
        clients = [
            threading.Thread(target=post, args=(f"large/{name}",))
            for name in ("bee/0.png", "ant/0.jpg") * 4
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert peak_of(server.process.pid) - before < BOUND_MB
    finally:
        server.kill()


def peak_of(pid):
    """Peak resident memory of a running process in MB."""
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
