"""serve.py: answers as predict.py's, bounds, batches, the end; its page in a browser."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT, execute, make_config, user_environment
from PIL import Image
from scipy.special import softmax

pytest.importorskip("uvicorn")

from src.dataset.decoding import decode_image  # noqa: E402
from src.dataset.transforms import eval_transform  # noqa: E402
from src.inference.backends import open_backends  # noqa: E402
from src.inference.checkpoint_model import CheckpointModel  # noqa: E402
from src.inference.export import export_checkpoint  # noqa: E402
from src.inference.heatmap import covered, heat, overlay  # noqa: E402
from src.inference.image_service import LARGEST_BODY, Bodies, ImageService  # noqa: E402
from src.inference.mindspore_backend import MindSporeBackend  # noqa: E402
from src.inference.onnx_backend import OnnxBackend  # noqa: E402
from src.inference.server_requests import RequestError, ServerMetrics, files_in_form  # noqa: E402
from src.inference.serving import bind, create_app, serve_app  # noqa: E402
from src.kernels.library import KernelChoice, has_isa  # noqa: E402
from src.utils.errors import UserError  # noqa: E402


class Server:
    """A serve.py that takes requests; ``port`` is its own."""

    def __init__(self, *flags):
        self.process = subprocess.Popen(
            ["python3", "serve.py", "--port=0", *map(str, flags)],
            cwd=ROOT,
            env=user_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        line = self.process.stdout.readline()
        self.port = int(re.search(r"on http://127\.0\.0\.1:(\d+)/", line)[1])

    def request(self, method, path, body=None, **headers):
        """(status, answer): JSON, text, or the bytes of an image."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content, kind = answer.read(), answer.headers["content-type"]
        if kind.startswith("image/"):
            return answer.status, content
        text = content.decode()
        return answer.status, json.loads(text) if kind == "application/json" else text

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def server(trained_run):
    found = Server(f"--checkpoint_file_path={trained_run}/best.ckpt")
    yield found
    if found.process.poll() is None:
        assert found.stop()[0] == 0


@pytest.mark.slow
def test_answers_are_those_of_predict(server, trained_run, image_root, tmp_path):
    names = sorted(map(str, (image_root / "val" / "bee").iterdir()))[:5]
    run = execute(
        [
            "python3",
            "predict.py",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            *names,
            f"--result_path={tmp_path}/p.json",
        ]
    )
    assert run.status == 0, run
    for name, expected in zip(names, json.loads((tmp_path / "p.json").read_text())):
        with open(name, "rb") as file:
            status, answer = server.request("POST", "/predict", file.read())
        assert status == 200
        found = {entry["class"]: entry["probability"] for entry in answer["predictions"]}
        assert found == pytest.approx(
            {entry["class"]: entry["probability"] for entry in expected["predictions"]}, abs=2e-6
        )


def test_many_clients_at_once_have_their_own_answers(server, image_root):
    names = [
        str(file)
        for name in ("ant", "bee", "cat")
        for file in sorted((image_root / "val" / name).iterdir())[:20]
    ]
    found = {}

    def ask(name):
        with open(name, "rb") as file:
            found[name] = server.request("POST", "/predict", file.read())

    before = server.request("GET", "/health")[1]
    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(status == 200 for status, _ in found.values())
    right = [answer["predictions"][0]["class"] in name for name, (_, answer) in found.items()]
    assert np.mean(right) > 0.9
    after = server.request("GET", "/health")[1]
    assert after["images"] - before["images"] == 60 and after["batches"] - before["batches"] <= 60


@pytest.mark.parametrize(
    "body,kind,status,word",
    [
        (b"", "", 400, "--data-binary"),
        (b"text", "", 400, "can be decoded"),
        (b"\xff\xd8\xff" + bytes(1000), "image/jpeg", 400, ""),
        (b"x" * (LARGEST_BODY + 1), "", 413, "20 MiB"),
        (b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x", 400, "--data-binary"),
        (
            b"--x\r\n\r\none\r\n--x\r\n\r\ntwo\r\n--x--",
            "multipart/form-data; boundary=x",
            400,
            "as the file of a form",
        ),
        (b'{"image": "", "top_k": 3}', "application/json", 400, "unknown keys: top_k"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(server, body, kind, status, word):
    found, answer = server.request(
        "POST", "/predict", body, **({"Content-Type": kind} if kind else {})
    )
    assert found == status and word in answer["error"] and "\n" not in answer["error"]
    assert server.request("GET", "/health")[0] == 200


def test_the_file_of_a_form_is_classified_like_a_body(server, image_root):
    photo = (image_root / "val" / "cat" / "003.jpg").read_bytes()
    form = (
        b'--edge\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
        b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + photo + b"\r\n--edge--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=edge"}
    assert server.request("POST", "/predict", form, **kind) == server.request(
        "POST", "/predict", photo
    )


def test_files_in_forms_arrive_as_they_are():
    """Also with line ends and boundaries' first characters in them."""
    random = np.random.default_rng(0)
    for number in range(300):
        values = [13, 10, 45, 0, 255] if number % 2 else range(256)
        data = random.choice(values, random.integers(0, 300)).astype(np.uint8).tobytes()
        form = b'--edge\r\nContent-Disposition: form-data; name="x"; filename="y"\r\n\r\n'
        found = files_in_form("multipart/form-data; boundary=edge", form + data + b"\r\n--edge--")
        assert found == [("y", data)], data
    assert files_in_form("multipart/form-data", b"no boundary") == []
    for written, name in (
        ("naïve & <b>.webp".encode(), "naïve & <b>.webp"),
        (b"na\xefve", "naïve"),
    ):
        form = b'--edge\r\nContent-Disposition: form-data; name="x"; filename="%s"\r\n\r\n'
        found = files_in_form(
            "multipart/form-data; boundary=edge", form % written + b"1\r\n--edge--"
        )
        assert found == [(name, b"1")]
    nested = b"--edge\r\nContent-Type: multipart/mixed; boundary=edge\r\n\r\n" * 3000
    assert files_in_form("multipart/form-data; boundary=edge", nested) is not None


def test_several_files_of_a_form_have_an_answer_each(server, image_root):
    photos = [(image_root / "val" / name / "000.jpg").read_bytes() for name in ("bee", "cat")]
    kind = {"Content-Type": "Multipart/Form-Data; boundary=edge"}

    def form(*files):
        head = b'--edge\r\nContent-Disposition: form-data; name="x"; filename="%d.jpg"\r\n\r\n'
        parts = (head % number + data + b"\r\n" for number, data in enumerate(files))
        return b"".join(parts) + b"--edge--"

    alone = [server.request("POST", "/predict", photo)[1] for photo in photos]
    status, found = server.request("POST", "/predict", form(*photos, b"text"), **kind)
    assert status == 200 and [answer.pop("image") for answer in found["answers"]] == [
        "0.jpg",
        "1.jpg",
        "2.jpg",
    ]
    assert found["answers"][:2] == alone
    assert found["answers"][2]["error"] == "2.jpg is not an image that can be decoded"
    assert server.request("POST", "/predict", form(photos[0]), **kind) == (200, alone[0])
    status, found = server.request("POST", "/predict", form(*[b"x"] * 65), **kind)
    assert status == 400 and "at most 64 images per request" in found["error"]


def test_images_in_json(server, image_root):
    photo = (image_root / "val" / "bee" / "000.jpg").read_bytes()
    text = base64.b64encode(photo).decode()
    kind = {"Content-Type": "application/json; charset=utf-8"}
    alone = server.request("POST", "/predict", photo)

    def ask(content):
        return server.request("POST", "/predict", content, **kind)

    assert ask(json.dumps({"image": text})) == alone
    assert ask(json.dumps({"image": f"data:image/jpeg;base64,{text}"})) == alone
    assert ask(json.dumps({"image": base64.encodebytes(photo).decode()})) == alone
    status, found = ask(json.dumps({"images": [text, "!!!", text]}))
    assert status == 200 and [one.pop("image")[-1] for one in found["answers"]] == ["0", "1", "2"]
    assert found["answers"] == [alone[1], {"error": "image 1 is not base64"}, alone[1]]
    status, found = ask(json.dumps({"images": [text]}))
    assert status == 200 and found == {"answers": [{"image": "image 0", **alone[1]}]}
    for content, words in {
        "{": "is not JSON",
        "[" * 100_000: "is not JSON",
        "[1]": 'send {"image": BASE64}',
        '{"images": [1]}': 'send {"image": BASE64}',
        '{"images": {}}': 'send {"image": BASE64}',
        '{"images": []}': "--data-binary",
        '{"image": "%"}': "image 0 is not base64",
        json.dumps({"image": text, "images": [text]}): "not both",
        json.dumps({"image": text, "images": []}): "not both",
    }.items():
        status, found = ask(content)
        assert status == 400 and words in found["error"], content


class Answering:
    """A service whose backend does as a test says, over real HTTP."""

    def __init__(self, backend):
        model = CheckpointModel(make_config(image_size=8, num_classes=3), False, None)
        self.figures, self.lines, ready = ServerMetrics(), [], threading.Event()
        signals = SimpleNamespace(defer_to=lambda stop: setattr(self, "stop", stop))
        address = bind("127.0.0.1", 0)
        self.port = address.getsockname()[1]

        def run():
            app = create_app(ImageService(model, [backend]), self.figures, self.lines.append)
            serve_app(app, address, signals, lambda text: ready.set())

        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert ready.wait(60)

    request = Server.request

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop(signal.SIGTERM)
        self.thread.join(60)


def encoded_image():
    return cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()


def test_a_request_finds_room_for_all_of_its_images_or_is_refused():
    opened = threading.Event()
    opened.set()

    def backend(images):
        assert opened.wait(60)
        return np.zeros((len(images), 3), np.float32)

    text = base64.b64encode(encoded_image()).decode()
    body, kind = json.dumps({"images": [text] * 64}), {"Content-Type": "application/json"}
    found = {}
    with Answering(backend) as server:
        opened.clear()

        def ask(number):
            found[number] = server.request("POST", "/predict", body, **kind)

        # 16 requests of 64 images are the 1,024 that there is room for.
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        while len(found) < 4:
            time.sleep(0.01)
        opened.set()
        for thread in threads:
            thread.join()
        assert server.figures.requests == {503: 4, 200: 16}
    for status, answer in found.values():
        if status == 200:
            assert not any("error" in one for one in answer["answers"])
        else:
            assert "too many" in answer["error"]


def test_large_bodies_that_arrive_slowly_do_not_keep_out_a_photograph(server, image_root):
    """Those that began first are refused when together they pass 256 MiB."""
    count, size = 24, 19 << 20
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {size + 1}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            for _ in range(count)
        ]
        for connection in slow:
            connection.sendall(head + bytes(size))
        photograph = next(image_root.glob("val/*/*")).read_bytes()
        assert server.request("POST", "/predict", photograph)[0] == 200
        for connection in slow:
            connection.sendall(b"x")
        statuses = Counter(int(connection.recv(1000).split()[1]) for connection in slow)
    # The others have arrived, and are no pictures. Some may still be in the system's buffers.
    assert statuses[503] >= 1 and statuses[503] + statuses[400] == count, statuses


def test_of_bodies_that_arrive_the_first_makes_room():
    """The bound is 1,000 bytes: nine that never end leave room for one that is larger than each."""

    class Request:
        def __init__(self, *parts, ends=True):
            self.headers, self._parts, self._ends = {}, parts, ends

        async def stream(self):
            for part in self._parts:
                yield bytes(part)
            if not self._ends:
                await asyncio.Event().wait()

    async def receive(bodies, request):
        async with bodies.receive(request) as body:
            return len(body)

    async def attack():
        bodies = Bodies(most=1000)
        slow = [asyncio.create_task(receive(bodies, Request(99, ends=False))) for _ in range(10)]
        await asyncio.sleep(0)
        assert await receive(bodies, Request(60, 60)) == 120
        async with bodies.receive(Request(990)) as body:
            # What has arrived is not dropped, so the next has no room.
            with pytest.raises(RequestError, match="too many"):
                await receive(bodies, Request(20))
            assert len(body) == 990
        assert await receive(bodies, Request(1000)) == 1000
        for task in slow:
            task.cancel()

    asyncio.run(attack())


@pytest.mark.parametrize("path", ["/predict", "/heatmap"])
def test_what_goes_wrong_in_the_network_is_an_answer_and_a_line(path):
    problem = {}

    def backend(images):
        if problem.get("raises"):
            raise RuntimeError("no more memory")
        return np.full((len(images), 3), problem.get("value", 0.0), np.float32)

    with Answering(backend) as server:
        problem["value"] = np.nan
        status, answer = server.request("POST", path, encoded_image())
        assert status == 500 and "are not finite" in answer["error"] and not server.lines
        problem["raises"] = True
        status, answer = server.request("POST", path, encoded_image())
        assert status == 500 and "its log says why" in answer["error"]
        assert server.lines == [f"{path} failed: RuntimeError: no more memory"]
        problem.clear()
        assert server.request("POST", path, encoded_image())[0] == 200


def test_a_client_that_hangs_up_is_no_failure_of_the_server():
    """Each wrote a line; with the log unread, 1,700 lines stopped the server."""
    with Answering(lambda images: np.zeros((len(images), 3), np.float32)) as server:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                connection.sendall(head + b"half")
        while server.figures.requests.total() < 3:
            time.sleep(0.01)
        assert server.figures.requests == {499: 3} and not server.lines
        assert server.request("POST", "/predict", encoded_image())[0] == 200


@pytest.mark.parametrize("excess", [1, 1 << 20])
def test_a_client_that_closes_learns_that_its_body_is_too_large(server, excess):
    """urllib sends Connection: close, and reads the answer when all is sent."""
    address = f"http://127.0.0.1:{server.port}/predict"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(address, bytes(LARGEST_BODY + excess), timeout=60)
    assert refusal.value.code == 413 and b"20 MiB" in refusal.value.read()


def test_figures_for_prometheus_count_requests_and_images(server, image_root):
    def figures():
        status, text = server.request("GET", "/metrics")
        assert status == 200
        lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = figures()
    server.request("POST", "/predict", (image_root / "val" / "bee" / "000.jpg").read_bytes())
    server.request("POST", "/predict", b"text")
    after = figures()
    risen = {name: value - before.get(name, 0) for name, value in after.items()}
    assert risen['acnet_requests_total{status="200"}'] == 1
    assert risen['acnet_requests_total{status="400"}'] == 1
    assert risen["acnet_request_seconds_count"] == 2 and risen["acnet_request_seconds_sum"] > 0
    assert risen["acnet_images_total"] == risen["acnet_batches_total"] == 1
    assert after["acnet_waiting_images"] == 0


def test_heat_maps_are_pictures_of_what_the_network_saw(server, trained_run, image_root):
    """The same picture as report.py's functions make of predict.py's network."""
    body = (image_root / "val" / "bee" / "003.jpg").read_bytes()
    found = {}

    def ask(number):
        found[number] = server.request("POST", "/heatmap", body)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    # Nobody waits for heat maps only.
    assert server.request("POST", "/predict", body)[0] == 200
    for thread in threads:
        thread.join()
    assert [status for status, _ in found.values()] == [200] * 3
    pictures = [
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        for _, content in found.values()
    ]
    model, (backend, *_) = open_backends(trained_run / "best.ckpt", {}, KernelChoice())
    image = eval_transform(decode_image(np.frombuffer(body, np.uint8), "bee"), model.config)
    images = np.concatenate([image[None], covered(image, model.config.mean)])
    probabilities = softmax(backend(images), axis=1)
    warmth = heat(probabilities, probabilities[0].argmax(), model.config.image_size)
    expected = overlay(image, warmth)[..., ::-1]
    for picture in pictures:
        assert picture.shape == expected.shape
        assert np.abs(picture.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("count,body", [(0, b"no image"), (2, None)])
def test_a_heat_map_is_of_one_image(server, image_root, count, body):
    file = (image_root / "val" / "bee" / "003.jpg").read_bytes()
    images = [base64.b64encode(file).decode()] * count
    body = body or json.dumps({"images": images}).encode()
    kind = {"content-type": "application/json"} if count else {}
    status, answer = server.request("POST", "/heatmap", body, **kind)
    assert status == 400 and ("one image" if count else "body") in answer["error"], answer


def test_the_description_names_every_place(server):
    status, found = server.request("GET", "/openapi.json")
    assert status == 200 and found["openapi"].startswith("3.1")
    assert "ant, bee, cat" in found["info"]["description"]
    status, page = server.request("GET", "/docs")
    assert status == 200 and all(f" {path}<" in page for path in found["paths"])
    for path, methods in found["paths"].items():
        for method in methods:
            assert server.request(method.upper(), path)[0] in (200, 400), path


def test_other_methods_and_places(server):
    assert (
        server.request("GET", "/predict")[0] == 405 and server.request("GET", "/nowhere")[0] == 404
    )
    status, text = server.request("GET", "/")
    assert status == 200 and "cifar_quick" in text and "<h1>ant, bee or cat?</h1>" in text
    assert "NETWORK" not in text and "QUESTION" not in text


@pytest.mark.extended
def test_a_checkpoint_has_both_engines_and_they_agree(trained_run, kernels, tmp_path):
    choice = KernelChoice(kernels)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    model, engines = open_backends(trained_run / "best.ckpt", {}, choice)
    assert [type(engine) for engine in engines] == [MindSporeBackend, OnnxBackend]
    ours, theirs = (engine(images) for engine in engines)
    assert (
        ours.shape == (3, model.config.num_classes)
        and np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    )
    for engine in ("mindspore", "onnx"):
        assert (
            len(open_backends(trained_run / "best.ckpt", {"eval_engine": engine}, choice)[1]) == 1
        )
    export_checkpoint(trained_run / "best.ckpt", {}, "ONNX", target=str(tmp_path / "net.onnx"))
    assert len(open_backends(tmp_path / "net.onnx", {}, choice)[1]) == 1


@pytest.mark.slow
def test_a_request_that_was_accepted_is_answered_before_the_end(trained_run, tmp_path):
    # Large enough that its decoding lasts for a while.
    cv2.imwrite(
        str(tmp_path / "large.png"),
        np.random.default_rng(0).integers(0, 255, (2000, 2200, 3), np.uint8),
    )
    server = Server(f"--checkpoint_file_path={trained_run}/best.ckpt")
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(
                server.request("POST", "/predict", (tmp_path / "large.png").read_bytes())
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while server.request("GET", "/health")[1]["images"] < 1:
        pass
    status, out, err = server.stop()
    for thread in threads:
        thread.join()
    assert status == 0 and "stopped; every accepted request" in out and "error" not in err, (
        out,
        err,
    )
    assert [code for code, _ in answers] == [200] * 4


@pytest.mark.slow
def test_an_address_that_is_taken_is_one_line(server, trained_run):
    run = execute(
        [
            "python3",
            "serve.py",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"--port={server.port}",
        ]
    )
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and f"cannot serve on 127.0.0.1:{server.port}" in run.error_lines[0]
    ), run


@pytest.mark.parametrize(
    "host,reason", [("192.0.2.1", "Cannot assign requested address"), ("no-such.invalid", "")]
)
def test_an_address_that_is_not_this_machines_is_refused(host, reason):
    with pytest.raises(UserError, match=f"cannot serve on {host}:8000: {reason}.*--port=0"):
        bind(host, 8000)


@pytest.mark.extended
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(server, image_root, tmp_path):
    classes = "[...document.querySelectorAll('#answers li')].map(item => item.innerText)"
    settled = (
        "new Promise(done => { const look = () => / ms$/.test(message.textContent) ? done() : "
        "setTimeout(look, 20); look() })"
    )
    with Browser(tmp_path, 390, 800) as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.choose_file("input", image_root / "val" / "bee" / "003.jpg")
        browser.run(settled)
        found = browser.run(classes)
        assert len(found) == 3 and found[0].startswith("bee"), found
        browser.run("document.querySelector('button').click()")
        browser.run(
            "new Promise(done => { const look = () => { const map = "
            "document.querySelector('img[alt^=heat]'); map && map.naturalWidth ? done() : "
            "setTimeout(look, 20) }; look() })"
        )
        browser.screenshot(tmp_path / "page.png")
        # A picture that is dropped.
        data = list((image_root / "val" / "cat" / "003.jpg").read_bytes())
        browser.run(f"""(() => {{ message.textContent = ''; const transfer = new DataTransfer();
            const file = new File([new Uint8Array({data})], 'cat.jpg', {{type: 'image/jpeg'}});
            transfer.items.add(file);
            const settings = {{dataTransfer: transfer, cancelable: true, bubbles: true}};
            const drop = new DragEvent('drop', settings);
            document.querySelector('h1').dispatchEvent(drop) }})()""")
        browser.run(settled)
        assert browser.run(classes)[0].startswith("cat")
        assert (
            browser.run("document.documentElement.scrollWidth") <= 390 and browser.complaints == []
        )
        (tmp_path / "text.jpg").write_text("text")
        browser.choose_file("input", tmp_path / "text.jpg")
        browser.run(
            "new Promise(done => { const look = () => document.querySelector('.bad') ? done() : "
            "setTimeout(look, 20); look() })"
        )
        said = browser.run("document.querySelector('.bad').textContent")
        assert said == "text.jpg is not a picture that can be read" and browser.run(classes) == []


def test_a_damaged_photograph_is_answered_and_said_to_be(server, image_root):
    """The server's log had it once, and the client never."""
    file = io.BytesIO()
    Image.open(next(image_root.glob("val/*/*"))).resize((600, 500)).save(file, "JPEG", quality=90)
    content = bytearray(file.getvalue())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    for _ in range(2):
        status, answer = server.request("POST", "/predict", bytes(content))
        assert status == 200 and "is damaged" in answer["damaged"] and answer["predictions"]
    assert server.request("POST", "/heatmap", bytes(content))[0] == 400
    assert "damaged" not in server.request("POST", "/predict", file.getvalue())[1]


def test_flags_in_a_form_are_refused(server, image_root):
    content = next(image_root.glob("val/*/*")).read_bytes()
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    for field, expected in (("top_k", 400), ("seed", 200), ("submit", 200)):
        parts = {'name="image"; filename="x.jpg"': content, f'name="{field}"': b"1"}
        body = b"".join(
            b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head.encode(), part)
            for head, part in parts.items()
        )
        status, answer = server.request("POST", "/predict", body + b"--b--\r\n", **kind)
        assert status == expected, (field, answer)
        assert status == 200 or "fields without effect: top_k" in answer["error"]


def test_in_bfloat16_the_server_has_one_backend(trained_run, kernels):
    """onnxruntime computes in float32: which of the two answered was left to their speed."""
    if not has_isa(kernels.isa, "AVX512_CORE_BF16"):
        pytest.skip("the processor has no bfloat16")
    flags = {"amp_level": "O2"}
    _, backends = open_backends(trained_run / "best.ckpt", flags, KernelChoice(kernels))
    assert len(backends) == 1
