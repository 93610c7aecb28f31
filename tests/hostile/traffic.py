"""Hostile traffic for serve.py, while honest clients use it too:

    python3 tests/hostile/traffic.py [--minutes=30] [--seed=0]

Serves a network that was trained on the bundled digits for one epoch. First honest clients are
alone, then attackers draw what they send from a seed: slow bodies, halves of requests, many idle
connections, large bodies that do not end, decompression bombs, wrong types, lengths and headers.
Prints the honest clients' requests, how many were not answered rightly, their 99th percentile alone
and in traffic, and the server's memory. The exit status is 1 if a request was lost.
"""

import argparse
import http.client
import io
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
_HONEST, _ATTACKERS = 2, 6
_ALONE_S = 20.0
_IDLE_CONNECTIONS = 200
_HELD_CONNECTIONS, _HELD_BYTES = 12, 16 * 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, port = started(folder)
        try:
            alone = Honest(port, _ALONE_S)
            memory = peak_mb(server.pid)
            ends = time.monotonic() + 60 * options.minutes
            attackers = [
                Attacker(port, options.seed * _ATTACKERS + number, ends)
                for number in range(_ATTACKERS)
            ]
            crowded = Honest(port, 60 * options.minutes)
            for attacker in attackers:
                attacker.join()
            attacks = sum((attacker.sent for attacker in attackers), Counter())
            for name in sorted(attacks):
                print(f"traffic attack={name} sent={attacks[name]}")
            print(
                f"traffic honest={crowded.answered} lost={crowded.lost} "
                f"p99_ms={crowded.p99_ms():.0f} alone_p99_ms={alone.p99_ms():.0f} "
                f"peak_mb={peak_mb(server.pid):.0f} alone_peak_mb={memory:.0f}",
                flush=True,
            )
        finally:
            server.send_signal(signal.SIGTERM)
            last = server.communicate(timeout=90)[0].splitlines()[-1]
        print(f"traffic end: {last}")
        sys.exit(bool(crowded.lost or alone.lost or server.returncode))


def started(folder):
    """(process, port) of a server."""
    words = [sys.executable, "train.py", "--config_path=digits", "--max_epoch=1"]
    subprocess.run(
        [*words, f"--output_path={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    weights = next(Path(folder).glob("*/best.ckpt"))
    server = subprocess.Popen(
        [sys.executable, "serve.py", f"--checkpoint_file_path={weights}", "--port=0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    # The rest is read at the end only: what clients do must not fill the server's log.
    line = server.stdout.readline()
    return server, int(line.rstrip("/\n").rpartition(":")[2])


def peak_mb(pid):
    """Peak resident memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


class Honest:
    """Clients that send a picture after the other for ``seconds``, each on one connection.

    Attributes:
        answered, lost: requests with the right answer, and others.
    """

    def __init__(self, port, seconds):
        self._port, self._ends = port, time.monotonic() + seconds
        self._lock, self._seconds, self.answered, self.lost = threading.Lock(), [], 0, 0
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        self._picture, self._expected = encoded(Image.fromarray(pixels)), None
        threads = [threading.Thread(target=self._send) for _ in range(_HONEST)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def p99_ms(self):
        return 1000 * float(np.percentile(self._seconds, 99))

    def _send(self):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        while time.monotonic() < self._ends:
            began = time.monotonic()
            try:
                connection.request("POST", "/predict", self._picture)
                answer = connection.getresponse()
                right = answer.status == 200 and self._is_expected(answer.read())
            except (OSError, http.client.HTTPException):
                right = False
                connection.close()
            with self._lock:
                self._seconds.append(time.monotonic() - began)
                self.answered, self.lost = self.answered + right, self.lost + (not right)
            time.sleep(0.02)
        connection.close()

    def _is_expected(self, body):
        with self._lock:
            self._expected = self._expected or body
        return body == self._expected


class Attacker(threading.Thread):
    """Sends one drawn attack after the other. ``sent`` counts them by name."""

    def __init__(self, port, seed, ends):
        super().__init__()
        self._port, self._draw, self._ends, self.sent = port, random.Random(seed), ends, Counter()
        self.start()

    def run(self):
        attacks = (
            self.slow,
            self.half,
            self.idle,
            self.held,
            self.bomb,
            self.wrong,
            self.large,
            self.odd,
        )
        while time.monotonic() < self._ends:
            attack = self._draw.choice(attacks)
            self.sent[attack.__name__] += 1
            with suppress(OSError):  # the server may close the connection
                attack()

    def slow(self):
        """A body that arrives byte by byte."""
        with self._connected() as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
            for _ in range(self._draw.randrange(100)):
                connection.sendall(b"x")
                time.sleep(0.05)

    def half(self):
        """A request that ends in the middle."""
        request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + bytes(60)
        with self._connected() as connection:
            connection.sendall(request[: self._draw.randrange(1, len(request))])

    def idle(self):
        """Many connections that say nothing."""
        connections = []
        try:
            for _ in range(self._draw.randrange(_IDLE_CONNECTIONS)):
                connections.append(self._connected())
            time.sleep(self._draw.random() * 3)
        finally:
            for connection in connections:
                connection.close()

    def held(self):
        """Several large bodies whose ends never come."""
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {_HELD_BYTES + 1}\r\n\r\n"
        with ExitStack() as stack:
            for _ in range(self._draw.randrange(_HELD_CONNECTIONS)):
                connection = stack.enter_context(self._connected())
                connection.sendall(head.encode() + bytes(_HELD_BYTES))
            time.sleep(self._draw.random() * 3)

    def bomb(self):
        """A small file whose header declares a huge picture."""

        def chunk(kind, data):
            checksum = struct.pack(">I", zlib.crc32(kind + data))
            return struct.pack(">I", len(data)) + kind + data + checksum

        side = self._draw.choice([9000, 20_000, 40_000, 2**31 - 1])
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
        rows = chunk(b"IDAT", zlib.compress(bytes(10**6)))
        self._post(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))

    def wrong(self):
        """What is no picture, or half of one."""
        picture = encoded(Image.new("RGB", (50, 40)), self._draw.choice(["JPEG", "GIF", "EPS"]))
        bodies = (b"", b"text", self._draw.randbytes(3000), picture[: self._draw.randrange(600)])
        self._post(self._draw.choice(bodies))

    def large(self):
        """A body near the limit, and a picture of many pixels."""
        if self._draw.random() < 0.5:
            self._post(bytes(self._draw.choice([19, 20, 21]) * 2**20))
        else:
            self._post(encoded(Image.new("RGB", (4000, 3000)), "JPEG"))

    def odd(self):
        """Requests that are no HTTP, or that contradict themselves."""
        lines = (
            b"\0\1\2\3\r\n\r\n",
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST /predict HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
            b"DELETE /predict HTTP/9.9\r\n\r\n",
        )
        with self._connected() as connection:
            connection.sendall(self._draw.choice(lines))
            connection.recv(1000)

    def _post(self, body):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        with closing(connection), suppress(http.client.HTTPException):  # it may not answer
            connection.request("POST", "/predict", body)
            connection.getresponse().read()

    def _connected(self):
        return socket.create_connection(("127.0.0.1", self._port), timeout=30)


if __name__ == "__main__":
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    main()
