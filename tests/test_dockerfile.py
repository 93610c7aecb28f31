"""The Dockerfile: its steps, run in a folder and an environment of their own."""

import http.client
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, Started, execute

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
# MB, as `docker image ls` shows them. The goal is for the whole image.
MOST, OF_BASE_IMAGE = 600, 135
pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image has Python 3.11"),
]


def steps(kind):
    return re.findall(rf"^{kind} (.*)$", DOCKERFILE, re.M)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """(folder, environment's bin, MB of both): what the steps make."""
    folder = tmp_path_factory.mktemp("image")
    app, environment = folder / "acnet", folder / "env"
    app.mkdir()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    ignored = shutil.ignore_patterns("__pycache__")
    for step in steps("COPY"):
        *sources, target = step.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, app / target, ignore=ignored)
            else:
                (app / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, app / target)
    before = megabytes(environment)
    (install,) = [step for step in steps("RUN") if "pip install" in step]
    run = execute(["bash", "-c", install], app, PATH=f"{environment}/bin:/usr/bin:/bin")
    assert run.status == 0, run
    size = megabytes(environment) - before + megabytes(app)
    return app, environment / "bin", size


def megabytes(folder):
    return sum(file.lstat().st_size for file in folder.rglob("*")) / 1e6


def test_the_image_is_small_and_has_no_mindspore(image):
    app, programs, size = image
    assert size + OF_BASE_IMAGE < MOST
    run = execute([programs / "python3", "-c", "import mindspore"], app)
    assert "No module named 'mindspore'" in run.err
    # What docker leaves out of what it is sent must not be what it copies.
    sent = (ROOT / ".dockerignore").read_text()
    for step in steps("COPY"):
        assert all(f"!{source.strip('/')}\n" in sent for source in step.split()[:-1]), step


def test_it_answers_as_predict_does(image, trained_run, image_root, tmp_path):
    app, programs, _ = image
    model, photo = tmp_path / "model.onnx", image_root / "val" / "bee" / "003.jpg"
    checkpoint = f"--checkpoint_file_path={trained_run}/best.ckpt"
    command = ["python3", "export.py", checkpoint, "--file_format=ONNX", f"--result_path={model}"]
    assert execute(command).status == 0
    result = f"--result_path={tmp_path}/p.json"
    assert execute(["python3", "predict.py", checkpoint, photo, result]).status == 0
    (expected,) = json.loads((tmp_path / "p.json").read_text())
    words = [word.replace("/model.onnx", str(model)) for word in json.loads(steps("CMD")[-1])]
    server = Started([programs / words[0], app / words[1], *words[2:], "--port=0"], tmp_path)
    try:
        server.wait_for_text("serving")
        (port,) = re.findall(r"on http://0\.0\.0\.0:(\d+)/", server.output())
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        connection.request("POST", "/predict", photo.read_bytes())
        found = json.loads(connection.getresponse().read())
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    finally:
        server.kill()
    for one, other in zip(found["predictions"], expected["predictions"], strict=True):
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], abs=2e-6)
