"""predict.py: any picture, probabilities, class names."""

import json

import numpy as np
import pytest
from conftest import execute
from PIL import Image

from src.inference.prediction import read_picture, softmax
from src.utils.errors import UserError


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
    seen = read_picture(tmp_path / "turned.png")
    assert seen.shape == (20, 10, 3) and seen[0, 0].tolist() == [255, 0, 0] and seen[-1, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode,suffix", [("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "gif"), ("1", "png"), ("I;16", "png")])
def test_other_kinds_of_pictures(picture, tmp_path, mode, suffix):
    converted = Image.fromarray(np.full((10, 20), 65535, np.uint16)) if mode == "I;16" else picture.convert(mode)
    converted.save(tmp_path / f"x.{suffix}")
    seen = read_picture(tmp_path / f"x.{suffix}")
    assert seen.shape == (10, 20, 3) and seen.dtype == np.uint8
    if mode in ("CMYK", "RGBA", "P"):
        assert seen[5, 2, 0] > 200 and seen[5, 2, 2] < 60 and seen[5, 17, 2] > 200
    if mode == "I;16":
        assert (seen == 255).all()


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "t.png")
    assert (read_picture(tmp_path / "t.png") == 255).all()


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("RGB", (10, 10)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="too large"):
        read_picture(tmp_path / "b.png")


def test_softmax_is_stable():
    found = softmax(np.array([[1000.0, 1000.0 + np.log(3)]]))
    assert np.allclose(found, [[0.25, 0.75]])


def test_predictions_as_json_and_sheet(trained_run, image_root, tmp_path):
    run = execute(["python3", "predict.py", f"--checkpoint_file_path={trained_run}/best.ckpt", f"{image_root}/val/bee",
                   f"{image_root}/val/cat/003.jpg", f"--result_path={tmp_path}/p.json", f"--save_figure={tmp_path}/sheet.png"])
    assert run.status == 0, run
    results = json.loads((tmp_path / "p.json").read_text())
    assert len(results) == 24 and results[-1]["image"].endswith("cat/003.jpg")
    probabilities = [entry["probability"] for entry in results[0]["predictions"]]
    assert len(probabilities) == 3 and sum(probabilities) == pytest.approx(1, abs=1e-4)
    assert probabilities == sorted(probabilities, reverse=True)
    best = [entry["predictions"][0]["class"] for entry in results]
    assert set(best) <= {"ant", "bee", "cat"} and np.mean([name == "bee" for name in best[:-1]]) > 0.9
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000


@pytest.mark.parametrize("arguments,word", [([], "no image given"), (["/nowhere.jpg"], "/nowhere.jpg"), (["README.md"], "README.md")])
def test_wrong_image_is_one_line(trained_run, arguments, word):
    run = execute(["python3", "predict.py", f"--checkpoint_file_path={trained_run}/best.ckpt", *arguments])
    assert run.status == 2 and len(run.error_lines) == 1 and word in run.error_lines[0], run
