"""load(...).predict(...): the answers of predict.py and eval.py, for files, pictures and arrays."""

import json

import numpy as np
import pytest
from conftest import execute
from PIL import Image

from acnet_mindspore import UserError, create_network, load
from src.utils.errors import DamagedImage


@pytest.fixture(scope="module")
def classifier(trained_run):
    return load(trained_run / "best.ckpt")


def test_the_answers_are_those_of_the_command(classifier, image_root, trained_run, tmp_path):
    """A folder of 23 images: one full batch of 16 and one that is filled up."""
    run = execute(
        [
            "python3",
            "predict.py",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"{image_root}/val/bee",
            f"--result_path={tmp_path}/p.json",
        ]
    )
    assert run.status == 0, run
    expected = json.loads((tmp_path / "p.json").read_text())
    found = classifier.predict(image_root / "val" / "bee")
    assert [one.as_dict() for one in found] == expected and len(found) == 23
    assert classifier.class_names == ["ant", "bee", "cat"]


def test_a_picture_and_an_array_are_as_good_as_a_file(classifier, image_root):
    file = image_root / "val" / "cat" / "003.jpg"
    picture = Image.open(file)
    of_file = classifier.logits([file])
    for photo in (str(file), picture, np.asarray(picture), np.asarray(picture)[:, ::-1][:, ::-1]):
        assert np.array_equal(classifier.logits([photo]), of_file)
    assert classifier.logits([]).shape == (0, 3)
    assert np.array_equal(classifier.logits(file), of_file)


def test_threads_share_classifiers(trained_run, image_root):
    """Without a lock, MindSpore ends the process."""
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from acnet_mindspore import load

classifiers, files = [load(sys.argv[1]) for _ in range(2)], sys.argv[2:] * 10

def ask(number):
    return classifiers[number % 2].predict(files[number]).probabilities

found = list(ThreadPoolExecutor(4).map(ask, range(len(files))))
print(found == list(map(ask, range(len(files)))))
"""
    files = [image_root / "val" / name / "003.jpg" for name in ("ant", "bee", "cat")]
    run = execute(["python3", "-c", code, trained_run / "best.ckpt", *files])
    assert run.status == 0 and run.out.strip().endswith("True"), run


def test_one_photo_gives_one_prediction(classifier, image_root):
    file = image_root / "val" / "bee" / "003.jpg"
    one, (again,) = classifier.predict(file), classifier.predict([file])
    assert one == again and one.classes[0] == "bee" and one.path == str(file)
    folder = file.parent
    assert len(classifier.predict([file, folder])) == 1 + len(classifier.predict(folder)) == 24


@pytest.mark.parametrize(
    "photo,word",
    [
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((3, 8, 8), np.uint8), "(3, 8, 8)"),
        (Image.new("F", (8, 8)), "mode F"),
        ("/nowhere.jpg", "/nowhere.jpg"),
        (np.zeros((0, 8, 3), np.uint8), "(0, 8, 3)"),
        (Image.new("La", (8, 8)), "mode La"),
        (3, "int"),
    ],
)
def test_what_is_no_photo_is_refused(classifier, photo, word):
    with pytest.raises(UserError) as refusal:
        classifier.predict(photo)
    assert word in str(refusal.value)


def test_evaluation_has_the_figures_of_the_command(
    classifier, image_root, trained_run, tmp_path, capsys
):
    run = execute(
        [
            "python3",
            "eval.py",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"--data_path={image_root}/train",
            f"--result_path={tmp_path}/e.json",
        ]
    )
    assert run.status == 0, run
    (expected,) = json.loads((tmp_path / "e.json").read_text())
    found = json.loads(json.dumps(classifier.evaluate(image_root / "train")))
    assert "the images that training used" in capsys.readouterr().err
    for one in (expected, found):
        del one["images_per_second"]
    assert found == expected and found["images"] == 48


def test_flags_are_those_of_predict(trained_run, image_root):
    file = image_root / "val" / "bee" / "003.jpg"
    assert len(load(trained_run / "best.ckpt", top_k=2).predict(file).classes) == 2
    with pytest.raises(UserError, match="did you mean 'top_k'"):
        load(trained_run / "best.ckpt", tp_k=2)
    with pytest.raises(UserError, match="flag of train.py"):
        load(trained_run / "best.ckpt", lr=3)
    with pytest.raises(UserError, match="save_figure changes nothing here: load"):
        load(trained_run / "best.ckpt", save_figure="x.png")
    with pytest.raises(UserError, match="create_network\\(\\) has random weights"):
        create_network("cifar_quick", 10, pretrained=trained_run / "best.ckpt")


def test_damage_is_an_error_for_strict_classifiers_only(trained_run, image_root, tmp_path):
    file, damaged = tmp_path / "x.jpg", tmp_path / "y.jpg"
    Image.open(image_root / "val" / "bee" / "003.jpg").resize((500, 400)).save(file, quality=90)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="y.jpg is damaged"):
        load(trained_run / "best.ckpt", strict=1).predict(damaged)
    with pytest.warns(DamagedImage):
        assert load(trained_run / "best.ckpt").predict(damaged).classes
