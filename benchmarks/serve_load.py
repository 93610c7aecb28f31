"""Load on serve.py.

`python3 benchmarks/serve_load.py [--network=resnet18] [--clients=1,8,64] [--seconds=10]`.

A server of the network with random weights and clients in a process of their own, each of which
sends the next photograph-sized JPEG when it has its answer. One line for each number of clients
with requests/s and the 50th and 99th percentile of the time of a request, before and after one for
onnxruntime called in a loop on the same files, decoding included.
"""

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.cli.run import run_process  # noqa: E402

_SIDE = (480, 360)
_FILES = 32


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument(
        "--client_of", default="", help="as which the benchmark starts itself: PORT:CLIENTS:FOLDER"
    )
    options = parser.parse_args(arguments)
    if options.client_of:
        port, clients, folder = options.client_of.split(":", 2)
        print(*asyncio.run(load(int(port), int(clients), bodies(folder), options.seconds)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.network)
        plain(folder, options)
        for clients in options.clients.split(","):
            served(folder, clients, options)
        plain(folder, options)


def prepare(folder, network):
    """A checkpoint, its ONNX file and JPEG files."""
    from src.utils.device import prepare_process

    prepare_process()
    import cv2
    import numpy as np

    from src.cli.recipes import load_config
    from src.inference.export import export_checkpoint
    from src.models.create import create_network
    from src.runs.checkpoint import save_checkpoint

    config = load_config({"network": network, "num_classes": "1000", "data_path": "none"})
    save_checkpoint(
        folder / "net.ckpt",
        create_network(config).get_parameters(),
        {"config": config.model_dump(mode="json")},
    )
    export_checkpoint(folder / "net.ckpt", {}, "ONNX", target=str(folder / "net.onnx"))
    random = np.random.default_rng(0)
    for number in range(_FILES):
        coarse = random.integers(0, 256, (_SIDE[1] // 20, _SIDE[0] // 20, 3), np.uint8)
        cv2.imwrite(
            str(folder / f"{number}.jpg"), cv2.resize(coarse, _SIDE, interpolation=cv2.INTER_CUBIC)
        )


def plain(folder, options):
    """onnxruntime on one image after the other."""
    import numpy as np

    from src.dataset.decoding import decode_image
    from src.dataset.transforms import eval_transform
    from src.inference.backends import open_backend
    from src.kernels.library import KernelChoice

    opened = open_backend(folder / "net.onnx", {}, KernelChoice())
    model, backend = opened.model, opened.backend
    files, times = bodies(folder), []
    began = time.perf_counter()
    while time.perf_counter() - began < options.seconds:
        started = time.perf_counter()
        backend(
            eval_transform(
                decode_image(np.frombuffer(files[len(times) % _FILES], np.uint8), "x"), model.config
            )[None]
        )
        times.append(time.perf_counter() - started)
    report("plain onnxruntime", options.network, "-", times, time.perf_counter() - began)


def served(folder, clients, options):
    server = subprocess.Popen(
        [
            sys.executable,
            ROOT / "serve.py",
            f"--checkpoint_file_path={folder}/net.ckpt",
            "--port=0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = re.search(r":(\d+)/$", server.stdout.readline())[1]
        found = subprocess.run(
            [
                sys.executable,
                __file__,
                f"--client_of={port}:{clients}:{folder}",
                f"--seconds={options.seconds}",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        report(
            "serve.py",
            options.network,
            clients,
            list(map(float, found.stdout.split())),
            options.seconds,
        )
    finally:
        server.terminate()
        server.wait()


def report(what, network, clients, times, seconds):
    cuts = statistics.quantiles(times, n=100)
    print(
        f"serve_load what={what.replace(' ', '_')} network={network} clients={clients} "
        f"requests_per_second={len(times) / seconds:.1f} "
        f"p50_ms={1000 * cuts[49]:.1f} p99_ms={1000 * cuts[98]:.1f}",
        flush=True,
    )


def bodies(folder):
    return [file.read_bytes() for file in sorted(Path(folder).glob("*.jpg"))]


async def load(port, clients, files, seconds):
    """Seconds of each request that was answered.

    The first of each client, which may wait for others' start, left out.
    """
    times = []
    end = time.perf_counter() + seconds

    async def client(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent = number
        while time.perf_counter() < end:
            body = files[sent % len(files)]
            sent += 1
            started = time.perf_counter()
            writer.write(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
                + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            answer = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            assert b" 200 " in head and b"predictions" in answer, answer
            times.append(time.perf_counter() - started)
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return times


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
