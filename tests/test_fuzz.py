"""More than 10,000 damaged inputs: every reader answers with its value or with one clear error."""

import cv2
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from src.cli.config import Config, validated
from src.cli.flags import ALIASES
from src.cli.recipes import read_recipe
from src.dataset.decoding import BadImage, read_image
from src.dataset.packed import save_part
from src.dataset.sources import open_images
from src.models.weight_files import read_weights
from src.runs.checkpoint import save_checkpoint
from src.utils.errors import UserError

_TOKENS = (
    b"\0",
    b"\xff" * 4,
    b"-1",
    b"99999999999999999999",
    b"nan",
    b": ",
    b"- ",
    b"[",
    b"{",
    b"&a ",
    b"*a",
    b"!!python/object:os.system",
    b"../",
    b"/etc/passwd",
    b"\r\n",
    b"\t",
    b"\xef\xbb\xbf",
    "ä".encode(),
    b"%s%n",
)


def mutated(content, random):
    """``content`` after one to four changes.

    Bits flipped, a part cut, doubled or replaced, a token put in, the end lost.
    """
    changed = bytearray(content)
    for _ in range(random.integers(1, 5)):
        if not changed:
            return bytes(changed)
        at, length = int(random.integers(len(changed))), int(random.integers(1, 40))
        kind = random.integers(6)
        if kind == 0:
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[at : at + length]
        elif kind == 3:
            changed[at : at + length] = random.bytes(length)
        elif kind == 4:
            changed[at:at] = _TOKENS[int(random.integers(len(_TOKENS)))]
        else:
            del changed[at:]
    return bytes(changed)


def survives(read, content, path, count, seed):
    """Feed ``count`` mutations of ``content`` to ``read(path)``.

    (those that were read, those that were refused).
    """
    random, accepted, refused = np.random.default_rng(seed), 0, 0
    for _ in range(count):
        path.write_bytes(mutated(content, random))
        try:
            read(path)
            accepted += 1
        except UserError as failure:
            assert str(failure).strip()
            refused += 1
    assert accepted + refused == count and refused, (accepted, refused)


# Few of PNG: a changed header claims up to the limit of 2^26 pixels, which take their time.
@pytest.mark.parametrize(
    "suffix,count", [(".jpg", 2600), (".png", 50), (".bmp", 500), (".webp", 1000), (".tiff", 500)]
)
def test_images(tmp_path, suffix, count):
    image = np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8)
    content = cv2.imencode(suffix, image)[1].tobytes()

    def read(path):
        decoded = read_image(str(path))
        assert decoded.ndim == 3 and decoded.shape[2] == 3 and decoded.dtype == np.uint8

    with pytest.raises(BadImage):
        (tmp_path / "a").write_bytes(content[:20])
        read(tmp_path / "a")
    survives(read, content, tmp_path / f"a{suffix}", count, seed=1)


def test_lists(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("a.jpg", "b.jpg", "c d.jpg"):
        (tmp_path / "train" / name).write_bytes(b"\xff\xd8\xff")
    content = b"train/a.jpg 0\ntrain/b.jpg 1\n\ntrain/c d.jpg 12\na.jpg 3\n" * 3

    def read(path):
        images = open_images(str(path), "train")
        assert all(file.startswith(str(tmp_path)) and "/../" not in file for file in images.paths)
        assert images.labels.min() >= 0

    survives(read, content, tmp_path / "train_list.txt", 3000, seed=2)


def test_configurations(tmp_path):
    content = (
        b"network: resnet18\nlr: 0.1\ncrop_scale: [0.08, 1.0]\nlr_epochs: [30, 60]\nsync_bn: 0\n"
        b"mean: [0.5, 0.5, 0.5]\nseed: 3\n"
    )
    defaults = read_recipe("default_config.yaml")

    def read(path):
        layer = read_recipe(path)
        assert set(layer) <= set(Config.model_fields) and not set(layer) & set(ALIASES)
        validated({**defaults, **layer})

    survives(read, content, tmp_path / "a.yaml", 2000, seed=3)


def small_parameters():
    return [
        Parameter(Tensor(np.arange(6, dtype=np.float32).reshape(2, 3)), name="conv.weight"),
        Parameter(Tensor(np.ones(4, np.float32)), name="norm.gamma"),
    ]


def test_checkpoints(tmp_path):
    save_checkpoint(tmp_path / "whole.ckpt", small_parameters(), {"epoch": 1})
    survives(
        read_weights, (tmp_path / "whole.ckpt").read_bytes(), tmp_path / "a.ckpt", 1500, seed=4
    )


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    save_file(
        {p.name: p.asnumpy() for p in small_parameters()},
        tmp_path / "whole",
        metadata={"metadata": '{"epoch": 1}'},
    )
    survives(
        read_weights, (tmp_path / "whole").read_bytes(), tmp_path / "a.safetensors", 1500, seed=5
    )


def test_packed_sets(tmp_path):
    save_part(
        tmp_path / "whole",
        [b"abc", b"", b"defgh"],
        np.array([0, 2, 0]),
        ["a.jpg", "b.jpg", "c.jpg"],
        {
            "class_to_index": {"ant": 0, "bee": 1, "cat": 2},
            "parts": 1,
            "images": 3,
            "source": 7,
            "short_side": 0,
            "quality": 90,
        },
    )

    def read(path):
        images = open_images(str(path), "train")
        assert len(images) == 3 and images.num_classes <= 10**6
        assert sum(len(images.packed.encoded(index)) for index in range(3)) == 8 and all(
            images.name(index) for index in range(3)
        )

    survives(read, (tmp_path / "whole").read_bytes(), tmp_path / "a.safetensors", 3000, seed=8)


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "whole", "w") as file:
        for parameter in small_parameters():
            file[parameter.name] = parameter.asnumpy()
    survives(read_weights, (tmp_path / "whole").read_bytes(), tmp_path / "a.hdf5", 400, seed=6)


def test_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.save(
        {p.name: torch.from_numpy(p.asnumpy().copy()) for p in small_parameters()},
        tmp_path / "whole",
    )
    survives(read_weights, (tmp_path / "whole").read_bytes(), tmp_path / "a.pth", 400, seed=7)
