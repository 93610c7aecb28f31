"""What the preview of a data set says and draws."""

import shutil

import cv2
import numpy as np
import pytest
from conftest import execute, write_image_folder
from PIL import Image


def preview(root, *flags):
    return execute(
        [
            "python3",
            "scripts/preview_dataset.py",
            f"--data_path={root}/train",
            f"--result_path={root}/preview.png",
            "--image_size=32",
            *flags,
        ]
    )


def test_a_sound_set_has_nothing_to_look_at(image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "copy")
    run = preview(tmp_path / "copy")
    assert (
        run.status == 0
        and "train: 48 images, 3 classes of 16 to 16 images" in run.out
        and "look:" not in run.out
    ), run
    assert (
        run.out.splitlines()[-1]
        == f"preview_dataset: to look at: 0, pictures in {tmp_path}/copy/preview.png"
    )
    picture = np.asarray(Image.open(tmp_path / "copy" / "preview.png").convert("RGB"))
    assert picture.shape[0] > 1000 and picture.std() > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage,words",
    [
        ("imbalance", ("the class 'ant' has 176 images and 'bee' 16", "prefer")),
        ("few", ("1 of 3 classes have fewer than 10 training images: cat",)),
        (
            "contradiction",
            ("1 training images are the same as one of another class", "bee/copy.jpg"),
        ),
        ("twice", ("1 training images are duplicates", "copy.jpg")),
        ("both", ("2 validation images are training images too", "val/bee/a.jpg")),
        ("tiny", ("1 images have a side below 16 pixels", "tiny.png")),
        pytest.param(
            "huge",
            ("1 images have more than 24 megapixels", "huge.png", "pack_dataset.py"),
            marks=pytest.mark.extended,
        ),
        ("unreadable", ("1 images cannot be read", "bad.jpg", "check_dataset.py")),
        pytest.param(
            "cut",
            ("1 images cannot be read", "cut.jpg", "check_dataset.py"),
            marks=pytest.mark.extended,
        ),
        pytest.param(
            "raw",
            ("left out of the images: 2 files", ".cr2", "IMG_0.CR2"),
            marks=pytest.mark.extended,
        ),
    ],
)
def test_what_is_wrong_is_said(image_root, tmp_path, damage, words):
    root = tmp_path / "copy"
    shutil.copytree(image_root, root)
    train = root / "train"
    if damage == "imbalance":
        write_image_folder(tmp_path / "more", "train", ("ant",), 160, seed=7)
        for file in (tmp_path / "more" / "train" / "ant").iterdir():
            shutil.copy(file, train / "ant" / f"more{file.name}")
    elif damage == "few":
        for file in sorted((train / "cat").iterdir())[:8]:
            file.unlink()
    elif damage == "contradiction":
        shutil.copy(train / "ant" / "000.jpg", train / "bee" / "copy.jpg")
    elif damage == "twice":
        shutil.copy(train / "ant" / "000.jpg", train / "ant" / "copy.jpg")
    elif damage == "both":
        for name in "ab":
            shutil.copy(train / "bee" / "001.jpg", root / "val" / "bee" / f"{name}.jpg")
    elif damage == "tiny":
        cv2.imwrite(str(train / "ant" / "tiny.png"), np.zeros((8, 40, 3), np.uint8))
    elif damage == "huge":
        cv2.imwrite(str(train / "ant" / "huge.png"), np.zeros((5000, 5000, 3), np.uint8))
    elif damage == "cut":
        content = (train / "ant" / "000.jpg").read_bytes()
        (train / "ant" / "cut.jpg").write_bytes(content[: len(content) // 2])
    elif damage == "raw":
        for number in range(2):
            (train / "ant" / f"IMG_{number}.CR2").write_bytes(b"II*\0\x10\0\0\0CR")
    else:
        (train / "ant" / "bad.jpg").write_text("text")
    run = preview(root)
    (line,) = [line for line in run.out.splitlines() if line.startswith("look:")]
    assert run.status == 0 and all(word in line for word in words), run


@pytest.mark.slow
def test_a_split_is_previewed_as_it_is_trained(image_root):
    run = preview(image_root, "--val_split=0.25")
    assert run.status == 0 and "train: 36 images" in run.out and "val: 12 images" in run.out, run
    (image_root / "preview.png").unlink()


@pytest.mark.extended
def test_preprocessing_is_that_of_the_weights(trained_run, image_root, tmp_path):
    """image_size=32 is recorded there: at 224 every image would have sides below 112 pixels."""
    run = execute(
        [
            "python3",
            "scripts/preview_dataset.py",
            "--config_path=finetune",
            f"--data_path={image_root}",
            f"--pretrained={trained_run}/best.ckpt",
            f"--result_path={tmp_path}/preview.png",
        ]
    )
    assert run.status == 0 and "look:" not in run.out and "warning" not in run.out + run.err, run
