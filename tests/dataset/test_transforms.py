"""Operations on one image."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import execute, make_config
from PIL import Image

from src.dataset.augmentations import sample_generator
from src.dataset.decoding import read_image
from src.dataset.transforms import Resizing, _random_part, color_jitter, eval_transform, padded_crop

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)


def test_random_parts_have_the_seeds_area_and_aspect():
    random = sample_generator(0, 0, 0)
    parts = [_random_part(random, 300, 400, (0.08, 1.0), (0.75, 1.333)) for _ in range(4000)]
    areas = np.array([w * h / 120_000 for _, _, w, h in parts])
    aspects = np.array([w / h for _, _, w, h in parts])
    assert areas.min() > 0.07 and areas.max() <= 1
    assert aspects.min() > 0.74 and aspects.max() < 1.35
    assert all(x >= 0 and y >= 0 and x + w <= 400 and y + h <= 300 for x, y, w, h in parts)


def test_aspect_of_random_parts_is_uniform_in_its_logarithm():
    random = sample_generator(0, 0, 0)
    parts = [
        _random_part(random, 300, 400, (0.1, 0.4), (0.75, 1.333)) for _ in range(4000)
    ]  # all of them fit
    logs = np.log([w / h for _, _, w, h in parts])
    low, high = math.log(0.75), math.log(1.333)
    assert (
        abs(logs.mean() - (low + high) / 2) < 0.01
        and abs(logs.std() - (high - low) / math.sqrt(12)) < 0.005
    )


def test_jitter_of_zero_strength_changes_nothing(image):
    assert np.array_equal(color_jitter(image, sample_generator(0, 0, 0), 0, 0, 0), image)


def test_brightness_is_uniform_in_its_range():
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = [
        color_jitter(grey, sample_generator(0, 0, i), 0.4, 0, 0)[0, 0, 0] for i in range(2000)
    ]
    assert min(values) >= 60 and max(values) <= 140
    assert abs(np.mean(values) - 100) < 2 and abs(np.std(values) - 80 / math.sqrt(12)) < 1


def test_padded_crop_moves_by_at_most_the_padding():
    image = np.zeros((8, 8, 3), np.uint8)
    image[4, 4] = 255
    places = {
        tuple(np.argwhere(padded_crop(image, sample_generator(0, 0, i), 2)[:, :, 0])[0])
        for i in range(500)
    }
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_evaluation_resizes_to_256_and_crops_the_central_224():
    config = make_config()
    assert config.resized_side == 256
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    cropped = eval_transform(ramp, config)
    assert cropped.shape == (224, 224, 3)
    assert cropped[0, 0, 0] == 16 and cropped[0, -1, 0] == 239


def _pillow(picture, filter, size=224, side=256):
    """torchvision's Resize(side), CenterCrop(size) of a Pillow image.

    Written from their documentation.
    """
    width, height = picture.size
    resized = (
        (side, int(side * height / width)) if width < height else (int(side * width / height), side)
    )
    left, top = (round((length - size) / 2) for length in resized)
    return np.asarray(picture.resize(resized, filter).crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "interpolation,filter",
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
def test_shorter_side_with_antialias_is_torchvisions_to_the_bit(
    interpolation, filter, turned, measured, tmp_path
):
    file = PHOTOGRAPH
    if turned:
        file = tmp_path / "turned.png"
        Image.open(PHOTOGRAPH).transpose(Image.Transpose.ROTATE_90).save(file)
    config = make_config(eval_resize_mode="shorter_side", antialias=1, interpolation=interpolation)
    found = eval_transform(read_image(str(file)), config)
    difference = np.abs(found.astype(int) - _pillow(Image.open(file).convert("RGB"), filter)).max()
    measured(
        f"evaluation preprocessing of a photograph, {interpolation}: largest difference from "
        f"Pillow's {difference} of 255"
    )
    assert difference == 0


def test_square_without_antialias_is_mindspores_to_the_bit():
    vision = pytest.importorskip("mindspore.dataset.vision")
    theirs = vision.CenterCrop((224, 224))(
        vision.Resize((256, 256))(vision.Decode()(np.fromfile(PHOTOGRAPH, np.uint8)))
    )
    assert np.array_equal(eval_transform(read_image(str(PHOTOGRAPH)), make_config()), theirs)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_without_antialias_is_pytorchs_to_one_level(interpolation):
    torch = pytest.importorskip(
        "torch", reason="PyTorch, a development-only dependency, is not installed"
    )
    image = read_image(str(PHOTOGRAPH))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    theirs = (
        torch.nn.functional.interpolate(pixels, size=(300, 256), mode=interpolation)
        .clamp(0, 255)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    assert np.abs(Resizing(interpolation)(image, 300, 256) - theirs).max() <= 1.01


def test_crop_pct_decides_what_is_resized_to():
    """Rounded down, as in timm 1.0's transforms_imagenet_eval."""
    assert make_config(image_size=224, crop_pct=0.95).resized_side == 235
    assert make_config(image_size=224).resized_side == 256
    assert make_config(network="cifar_quick").resized_side == 32


@pytest.mark.parametrize("antialias", [0, 1])
@pytest.mark.parametrize("shape", [(3, 400), (400, 3), (5, 60)])
def test_a_part_of_an_enlarged_picture_is_that_of_the_whole(shape, antialias, monkeypatch):
    """Pictures of extreme shape are enlarged only where the crop shows them: the same pixels."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    config = make_config(image_size=224, eval_resize_mode="shorter_side", antialias=antialias)
    whole = eval_transform(image, config)
    monkeypatch.setattr("src.dataset.transforms._MAX_RESIZED_PIXELS", 0)
    part = eval_transform(image, config)
    assert part.shape == whole.shape == (224, 224, 3)
    assert np.abs(part.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "shape,whole", [((4, 400), (224, 22400)), ((64, 16000), (1900, 1900)), ((300, 1), (2400, 8))]
)
def test_a_part_without_antialias_is_opencvs_also_where_one_side_shrinks(
    shape, whole, interpolation
):
    """It was off by up to 171 of 255."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    resize, side = Resizing(interpolation, antialias=False), min(whole)
    top, left = ((length - side) // 2 for length in whole)
    part = resize.part(image, whole, (top, left), side).astype(int)
    assert np.abs(part - resize(image, *whole)[top : top + side, left : left + side]).max() <= 1


def test_a_picture_of_a_line_takes_little_memory():
    """1 x 65000 pixels took 17 GB: enlarged to 256 x 16640000 before the crop."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
import numpy as np
from src.cli.recipes import load_config
from src.dataset.transforms import eval_transform
config = load_config({"data_path": "x", "eval_resize_mode": "shorter_side", "antialias": "1"})
image = eval_transform(np.full((1, 65000, 3), 7, np.uint8), config)
print(image.shape, (image == 7).all())
"""
    run = execute(["python3", "-c", code])
    assert run.status == 0 and run.out == "(224, 224, 3) True\n", run
