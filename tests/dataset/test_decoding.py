"""An image file gives the same pixels in training, evaluation, prediction and packed sets."""

import os

import numpy as np
import pytest
from conftest import execute
from PIL import Image

from src.dataset.decoding import read_image
from src.dataset.packed import pack
from src.dataset.sources import open_images
from src.utils.errors import UserError

TURNS = {
    1: lambda x: x,
    3: lambda x: x[::-1, ::-1],
    6: lambda x: np.rot90(x, 1),
    8: lambda x: np.rot90(x, -1),
    2: lambda x: x[:, ::-1],
}


@pytest.fixture
def picture():
    """Left half red, right half blue, 20 x 10."""
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10, 0], pixels[:, 10:, 2] = 255, 255
    return Image.fromarray(pixels)


def test_exif_orientation_is_applied(picture, tmp_path):
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    seen = read_image(tmp_path / "turned.png")
    assert (
        seen.shape == (20, 10, 3)
        and seen[0, 0].tolist() == [255, 0, 0]
        and seen[-1, 0].tolist() == [0, 0, 255]
    )


@pytest.mark.parametrize(
    "mode,suffix",
    [("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "gif"), ("1", "png"), ("I;16", "png")],
)
def test_other_kinds_of_pictures(picture, tmp_path, mode, suffix):
    converted = (
        Image.fromarray(np.full((10, 20), 65535, np.uint16))
        if mode == "I;16"
        else picture.convert(mode)
    )
    converted.save(tmp_path / f"x.{suffix}")
    seen = read_image(tmp_path / f"x.{suffix}")
    assert seen.shape == (10, 20, 3) and seen.dtype == np.uint8
    if mode in ("CMYK", "RGBA", "P"):
        assert seen[5, 2, 0] > 200 and seen[5, 2, 2] < 60 and seen[5, 17, 2] > 200
    if mode == "I;16":
        assert (seen == 255).all()


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "t.png")
    assert (read_image(tmp_path / "t.png") == 255).all()


@pytest.mark.parametrize("side", [8500, 20000])
def test_decompression_bomb_is_refused(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="too many pixels"):
        read_image(tmp_path / "b.png")


def photograph():
    """A smooth picture of 60 x 40 without symmetries."""
    y, x = np.mgrid[:40, :60]
    return np.stack([4 * x, 6 * y, (x * y) // 10], axis=2).clip(0, 255).astype(np.uint8)


def stored_turned(path, orientation, pixels, **options):
    """The picture as a camera held askew stores it: turned pixels, and how to turn them back."""
    picture = Image.fromarray(np.ascontiguousarray(TURNS[orientation](pixels)))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_that_its_camera_stored_turned_is_the_upright_one(tmp_path, orientation, suffix):
    options = (
        {"lossless": True}
        if suffix == "webp"
        else {"quality": 95, "subsampling": 0}
        if suffix == "jpg"
        else {}
    )
    stored_turned(tmp_path / f"x.{suffix}", orientation, photograph(), **options)
    seen = read_image(tmp_path / f"x.{suffix}")
    assert seen.shape == (40, 60, 3)
    assert np.abs(seen.astype(int) - photograph()).max() <= (0 if suffix != "jpg" else 12)


def test_opencv_and_pillow_decode_the_same_jpeg(tmp_path):
    """One decoder reads an upright JPEG, the other one with an orientation.

    The pixels are the same but for rounding.
    """
    Image.fromarray(photograph()).save(tmp_path / "plain.jpg", quality=90)
    with Image.open(tmp_path / "plain.jpg") as picture:
        by_pillow = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(read_image(tmp_path / "plain.jpg") - by_pillow).max() <= 1


def test_every_command_and_packed_sets_see_the_same_picture(tmp_path):
    """Photographs upright, turned by their camera and transparent.

    Training, evaluation and packed sets read what predict.py reads.
    """
    for name in ("upright", "turned", "transparent"):
        (tmp_path / "train" / name).mkdir(parents=True)
    Image.fromarray(photograph()).save(tmp_path / "train" / "upright" / "a.png")
    stored_turned(tmp_path / "train" / "turned" / "a.png", 6, photograph())
    clear = np.dstack(
        [photograph(), np.where(np.arange(60) < 30, 0, 255)[None].repeat(40, 0).astype(np.uint8)]
    )
    Image.fromarray(clear).save(tmp_path / "train" / "transparent" / "a.png")
    folder = open_images(str(tmp_path / "train"), "train")
    order = [path.split("/")[-2] for path in folder.paths]
    seen = dict(zip(order, map(folder.load, range(3))))
    assert np.array_equal(seen["upright"], photograph()) and np.array_equal(
        seen["turned"], photograph()
    )
    assert (seen["transparent"][:, :30] == 255).all() and np.array_equal(
        seen["transparent"][:, 30:], photograph()[:, 30:]
    )
    for side in (0, 30):
        target = str(tmp_path / f"{side}.safetensors")
        pack(folder, target, side, 95, 1, lambda count: None)
        packed = open_images(target, "train")
        for index in range(3):
            expected = folder.load(index)
            assert packed.load(index).shape[:2] == (expected.shape[:2] if side == 0 else (30, 45))
            assert side or np.array_equal(packed.load(index), expected)
            assert np.abs(packed.load(index).mean((0, 1)) - expected.mean((0, 1))).max() < 3


@pytest.fixture
def pipe(tmp_path):
    (tmp_path / "ant").mkdir()
    os.mkfifo(tmp_path / "ant" / "pipe.jpg")
    return tmp_path


def test_a_named_pipe_is_no_image_and_hangs_nothing(pipe):
    with pytest.raises(UserError, match="not a regular file"):
        read_image(str(pipe / "ant" / "pipe.jpg"))
    run = execute(
        ["python3", "train.py", f"--data_path={pipe}", f"--output_path={pipe}/out"], timeout=60
    )
    assert run.status == 2 and len(run.error_lines) == 1, run


@pytest.mark.parametrize("side", [4, 20000])
def test_what_only_opencv_knows_is_refused_because_nothing_bounds_it(tmp_path, side):
    """A Radiance picture: Pillow cannot read its header, OpenCV would decode it to any size."""
    header = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {side} +X {side}\n".encode()
    (tmp_path / "x.jpg").write_bytes(header + bytes(4 * 4 * 4))
    with pytest.raises(UserError, match="not an image that can be decoded"):
        read_image(str(tmp_path / "x.jpg"))
