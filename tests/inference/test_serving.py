"""serve.py: answers as predict.py's, bounds, batches, the end; its page in a browser."""

import asyncio
import base64
import http.client
import json
import re
import signal
import subprocess
import threading
import time

import cv2
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT, execute, user_environment

pytest.importorskip("uvicorn")

from src.inference.backends import MindSporeBackend, open_backends  # noqa: E402
from src.inference.export import export_checkpoint  # noqa: E402
from src.inference.onnx import OnnxBackend  # noqa: E402
from src.inference.server_requests import files_in_form  # noqa: E402
from src.inference.serving import LARGEST_BODY, Batcher, Busy, bind  # noqa: E402
from src.kernels.library import KernelChoice  # noqa: E402
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
        """(status, JSON or text of the answer)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if answer.headers[
            "content-type"
        ] == "application/json" else text

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
    }.items():
        status, found = ask(content)
        assert status == 400 and words in found["error"], content


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


def test_the_description_names_every_place(server):
    status, found = server.request("GET", "/openapi.json")
    assert status == 200 and found["openapi"].startswith("3.1")
    assert "ant, bee, cat" in found["info"]["description"]
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


def test_what_waits_is_one_batch_and_there_is_a_bound():
    sizes = []

    def engine(images):
        sizes.append(len(images))
        return images.reshape(len(images), -1)[:, :2].astype(np.float32)

    async def trial():
        batcher = Batcher([engine], 8, queued=20)
        images = [np.full((8, 8, 3), number, np.uint8) for number in range(21)]
        asked = [asyncio.ensure_future(batcher.classify(image)) for image in images]
        await asyncio.sleep(0)
        running = asyncio.ensure_future(batcher.run())
        found = await asyncio.gather(*asked, return_exceptions=True)
        running.cancel()
        return found

    found = asyncio.run(trial())
    assert isinstance(found[20], Busy) and all(
        isinstance(answer, np.ndarray) for answer in found[:20]
    )
    assert sizes == [16, 4]


def test_each_size_of_a_batch_takes_the_engine_that_is_fastest_for_it():
    used = []

    def engine(name, of_batch, of_image):
        def compute(images):
            time.sleep(of_batch + of_image * len(images))
            used.append(name)
            return np.zeros((len(images), 3), np.float32)

        return compute

    async def run():
        batcher = Batcher([engine("large", 0.08, 0.001), engine("small", 0.0, 0.02)], 8)
        batcher.warm_up()
        used.clear()
        running = asyncio.create_task(batcher.run())
        await batcher.classify(np.zeros((8, 8, 3), np.uint8))
        await asyncio.gather(*[batcher.classify(np.zeros((8, 8, 3), np.uint8)) for _ in range(16)])
        running.cancel()

    asyncio.run(run())
    assert used == ["small", "large"]


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


def test_a_failing_engine_does_not_end_the_batcher():
    def engine(images):
        if images[0, 0, 0, 0] == 1:
            raise RuntimeError("this one")
        return np.zeros((len(images), 2), np.float32)

    async def trial():
        batcher = Batcher([engine], 8)
        running = asyncio.ensure_future(batcher.run())
        with pytest.raises(RuntimeError, match="this one"):
            await batcher.classify(np.full((8, 8, 3), 1, np.uint8))
        assert (await batcher.classify(np.zeros((8, 8, 3), np.uint8))).tolist() == [0.5, 0.5]
        running.cancel()

    asyncio.run(trial())


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
