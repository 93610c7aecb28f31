"""Weights by name or address, from a server of this machine."""

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import ROOT, TINY, execute, mpirun, randomise
from safetensors.numpy import save_file

from src.models.create import create_model
from src.models.networks import NETWORKS, torch_name
from src.models.published_weights import (
    fetch_weights,
    find_published,
    local_weights,
    place_for_output,
    published_weights,
)
from src.utils.download import sha256_in_name
from src.utils.errors import UserError

HUB = "https://huggingface.co/"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that a server in the place of Hugging Face serves; the user's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield folder
        server.shutdown()


def write_weights(file, classes=1000):
    network = create_model("resnet18", classes)
    randomise(network)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({torch_name(p.name, "resnet18"): p.asnumpy() for p in network.get_parameters()}, file)


def test_the_table_is_whole():
    for name, weights in published_weights().items():
        assert weights.network in NETWORKS and name.startswith(weights.network.partition("_")[0])
        if weights.url.startswith(HUB):
            assert weights.url == f"{HUB}timm/{name}/resolve/main/model.safetensors"
        else:
            assert len(sha256_in_name(weights.url)) == 8 and name in weights.url
        size = NETWORKS[weights.network].size
        assert abs(weights.megabytes - 4 * size.parameters / 1e6) < 1
        row = f"| `{name}` | {weights.network} | {weights.megabytes} | {weights.top1:.2f} |"
        assert row in (ROOT / "docs/weights.md").read_text()


@pytest.mark.parametrize(
    "name,meant",
    [
        ("resnet18", "resnet18.tv_in1k"),
        ("sres18", "resnet18.tv_in1k"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("alexnet", "alexnet-owt-7be5be79"),
    ],
)
def test_what_a_name_stands_for(name, meant):
    assert find_published(name).name == meant
    assert meant in local_weights(name)


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").write_text("")
    fetch_weights("resnet18")
    assert local_weights("resnet18") == "resnet18"


@pytest.mark.parametrize(
    "name,words",
    [
        ("resnet19", "does not exist .did you mean 'resnet18'"),
        ("missing/resnet18.ckpt", "'missing/resnet18.ckpt' does not exist$"),
        ("True", "name the weights, as in --pretrained=resnet18"),
        ("cifar_quick", "no published weights of cifar_quick are known"),
        ("ftp://host/resnet18.safetensors", "is not an address: it must be https://HOST/FILE"),
        ("https://[::1/resnet18.safetensors", "is not an address: it must be https://HOST/FILE"),
        ("http://me:secret@host/a.safetensors", "address of host has a user name or password"),
        ("https://host/weights/", "is not the address of a file"),
    ],
)
def test_names_that_stand_for_nothing(name, words):
    with pytest.raises(UserError, match=words):
        fetch_weights(name)


def test_pytorch_files_are_refused_before_the_download_without_pytorch(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="PyTorch is not installed"):
        fetch_weights("alexnet")


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="fetch the file on another machine and save it as /") as e:
        fetch_weights("resnet18")
    file = str(e.value).rpartition("save it as ")[2]
    write_weights(hub / "model.safetensors")
    (hub / "model.safetensors").rename(file)
    fetch_weights("resnet18")
    assert local_weights("resnet18") == file


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b"truncated"])
def test_a_file_of_another_kind_is_not_kept_although_its_sum_is_unknown(hub, content):
    file = hub / "timm/resnet18.tv_in1k/resolve/main/model.safetensors"
    write_weights(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] if content == b"truncated" else content)
    with pytest.raises(UserError, match="damaged or of another format; nothing is kept"):
        fetch_weights("resnet18")
    file.write_bytes(whole)
    fetch_weights("resnet18")
    with open(local_weights("resnet18"), "rb") as kept:
        assert kept.read() == whole


def test_a_mirror_is_an_address(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.example")
    with pytest.raises(UserError, match="HF_ENDPOINT=hf-mirror.example must begin with https://"):
        fetch_weights("resnet18")


def test_an_address_brings_the_preprocessing_that_stands_next_to_it(hub, monkeypatch):
    folder = hub / "someone/weights/resolve/main"
    write_weights(folder / "model.safetensors")
    config = {"architecture": "resnet18", "crop_pct": 0.9}
    (folder / "config.json").write_text(json.dumps(config))
    address = f"{HUB}someone/weights/resolve/main/model.safetensors?download=true"
    fetch_weights(address)
    file = local_weights(address)
    assert file.endswith("/model.safetensors")
    with open(file.replace("model.safetensors", "config.json")) as kept:
        assert json.load(kept) == config
    assert str(place_for_output(ROOT / "a.ckpt")) == str(ROOT / "a.ckpt")


def test_commands_use_published_weights_with_their_preprocessing(hub, image_root, tmp_path):
    published = hub / "timm/resnet18.a1_in1k/resolve/main/model.safetensors"
    write_weights(published)
    photo = image_root / "val/ant/002.jpg"
    words = ["python3", ROOT / "predict.py", "--image_size=64", photo]
    by_name = execute([*words, "--checkpoint_file_path=resnet18.a1_in1k"], cwd=tmp_path)
    assert by_name.status == 0 and "resnet18.a1_in1k (47 MB, Apache-2.0)" in by_name.err, by_name
    published.rename(tmp_path / "resnet18.safetensors")
    same = ["--crop_pct=0.95", "--interpolation=bicubic"]
    by_file = execute([*words, "--checkpoint_file_path=resnet18.safetensors", *same], cwd=tmp_path)
    assert by_file.status == 0 and by_name.out == by_file.out, (by_name, by_file)
    # From the cache: the server no longer has the file.
    words = ["python3", ROOT / "export.py", "--checkpoint_file_path=resnet18.a1_in1k"]
    made = execute([*words, "--image_size=64", "--file_format=SAFETENSORS"], cwd=tmp_path)
    assert made.status == 0 and (tmp_path / "resnet18.a1_in1k.safetensors").is_file(), made
    card = (tmp_path / "resnet18.a1_in1k.safetensors.md").read_text()
    assert "These are the published weights resnet18.a1_in1k" in card and "Apache-2.0" in card
    assert "Not recorded in the file of weights" in card and "bicubic" in card


@pytest.mark.slow
def test_ranks_fetch_the_weights_that_training_starts_from_once(hub, image_root, tmp_path):
    write_weights(hub / "timm/resnet18.tv_in1k/resolve/main/model.safetensors")
    tiny = [word for word in TINY if not word.startswith(("--network", "--image_size"))]
    run = mpirun(
        2, "train.py", f"--data_path={image_root}", f"--output_path={tmp_path}/out", *tiny,
        "--config_path=finetune", "--pretrained=resnet18", "--image_size=32", "--max_steps=2",
    )  # fmt: skip
    assert run.status == 0, run
    assert run.err.count("downloading resnet18.tv_in1k") == 1, run
    assert "resnet18.tv_in1k/model.safetensors without classifier" in run.out, run
