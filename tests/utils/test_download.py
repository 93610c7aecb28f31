"""Downloads from a server of this machine: checked, continued, once for all processes."""

import hashlib
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from conftest import ROOT

from src.utils.download import NotFound, download, sha256_in_name
from src.utils.errors import UserError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT under every path; how is in the attributes.

    Attributes:
        breaks_at: how many bytes of the file each connection sends at most; None: all.
        sends_sum: whether it redirects and sends the SHA-256 with that, as Hugging Face does.
        content_type, status: of its answers.
        requests: the Range header and path of each request, in order.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks_at, self.sends_sum, self.has_ranges = None, False, True
        self.content_type, self.status = "application/octet-stream", 200
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        if server.sends_sum and not self.path.startswith("/kept"):
            self.send_response(302)
            self.send_header("Location", f"/kept{self.path}")
            self.send_header("X-Linked-ETag", f'"{SHA256}"')
            self.end_headers()
            return
        server.requests.append((wanted, self.path))
        if server.status != 200:
            self.send_error(server.status)
            return
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.has_ranges else 0
        if first >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.send_header("Content-Type", server.content_type)
        self.end_headers()
        end = len(CONTENT) if server.breaks_at is None else first + server.breaks_at
        self.wfile.write(CONTENT[first:end])

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with Server() as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_file_arrives_and_is_not_fetched_again(server, tmp_path):
    target = tmp_path / "new" / "a.bin"
    download(f"{server.url}/a.bin", target, SHA256[:8])
    download(f"{server.url}/a.bin", target, SHA256[:8])
    assert target.read_bytes() == CONTENT and len(server.requests) == 1
    assert not target.with_name("a.bin.part").exists()


def test_an_interrupted_download_continues_where_it_ended(server, tmp_path):
    server.breaks_at = 1_200_000
    download(f"{server.url}/a.bin", tmp_path / "a.bin", SHA256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [wanted for wanted, _ in server.requests] == [None, "bytes=1200000-", "bytes=2400000-"]


@pytest.mark.parametrize("known", ["by the caller", "by the server"])
def test_the_next_command_continues_too(server, tmp_path, known):
    server.breaks_at, server.sends_sum = 400_000, known == "by the server"
    sha256 = SHA256[:8] if known == "by the caller" else ""
    with pytest.raises(UserError, match=r"after 1\.2 MB; run the command again, or .* save it as"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin", sha256)
    assert not (tmp_path / "a.bin").exists()
    server.breaks_at = None
    download(f"{server.url}/a.bin", tmp_path / "a.bin", sha256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests[-1][0] == "bytes=1200000-"


def test_without_a_known_sum_it_begins_again_because_the_file_may_be_another(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"of another version")
    download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_the_whole_file_again(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    server.has_ranges = False
    download(f"{server.url}/a.bin", tmp_path / "a.bin", SHA256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("known", ["by the caller", "by the server"])
@pytest.mark.parametrize("beginning", [b"another file", CONTENT + b"too long"])
def test_a_file_with_another_sum_is_not_kept(server, tmp_path, known, beginning):
    server.sends_sum = known == "by the server"
    (tmp_path / "a.bin.part").write_bytes(beginning)
    with pytest.raises(UserError, match="not the expected file: its SHA-256 begins with"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin", "" if server.sends_sum else SHA256)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == []
    download(f"{server.url}/a.bin", tmp_path / "a.bin", SHA256)


def test_a_damaged_file_is_noticed_when_it_is_used_again(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=f"does not begin with {SHA256[:8]}; delete it"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin", SHA256[:8])


@pytest.mark.parametrize("status,error", [(404, NotFound), (403, UserError)])
def test_what_the_server_answers_is_said(server, tmp_path, status, error):
    server.status = status
    with pytest.raises(error, match=f"the server answers {status} .*save it as {tmp_path}/a.bin$"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


def test_a_web_page_in_place_of_the_file_is_refused(server, tmp_path):
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="is a web page"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


def test_the_proxy_of_the_environment_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    download("http://weights.invalid/a.bin", tmp_path / "a.bin", SHA256)
    assert server.requests == [(None, "http://weights.invalid/a.bin")]


def test_processes_that_start_together_fetch_it_once(server, tmp_path):
    script = (
        "import sys; from pathlib import Path; from src.utils.download import download\n"
        "download(sys.argv[1], Path(sys.argv[2]))"
    )
    words = [sys.executable, "-c", script, f"{server.url}/a.bin", str(tmp_path / "a.bin")]
    processes = [subprocess.Popen(words, cwd=ROOT) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert len(server.requests) == 1 and (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_is_said(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        download(f"{server.url}/a.bin", tmp_path / "file" / "a.bin")


def test_pytorch_names_hold_the_sum():
    assert sha256_in_name("https://download.pytorch.org/models/resnet18-f37072fd.pth") == "f37072fd"
    assert sha256_in_name("https://host/resnet18-f37072fd.pth?download=1") == "f37072fd"
    for name in ("resnet18.pth", "resnet18-20240101.pth", "resnet18-f37072fd.safetensors"):
        assert sha256_in_name(f"https://host/{name}") == ""


def test_letters_beyond_ascii_are_encoded(server, tmp_path):
    download(f"{server.url}/é a.bin", tmp_path / "a.bin")
    assert server.requests[0][1] == "/%C3%A9%20a.bin"


def test_a_server_that_is_overloaded_is_asked_again(server, tmp_path):
    server.status = 503
    with pytest.raises(UserError, match="answers 503 .*; run the command again, or fetch"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert len(server.requests) == 3


def test_a_proxy_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UserError, match=r"\(http_proxy is set\)"):
        download("http://weights.invalid/a.bin", tmp_path / "a.bin")
