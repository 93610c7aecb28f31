"""predict.py: any picture, probabilities, class names."""

import json

import numpy as np
import pytest
from conftest import execute
from PIL import Image

from src.inference.prediction import softmax


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


def test_one_bad_file_does_not_silence_the_others(trained_run, image_root, tmp_path):
    (tmp_path / "bad.jpg").write_text("text")
    run = execute(["python3", "predict.py", f"--checkpoint_file_path={trained_run}/best.ckpt", f"{image_root}/val/bee/003.jpg",
                   f"{tmp_path}/bad.jpg", f"{image_root}/val/cat/003.jpg", f"--result_path={tmp_path}/p.json"])
    assert run.status == 1 and len(run.error_lines) == 1 and "1 of 3 images" in run.error_lines[0] and "bad.jpg" in run.error_lines[0], run
    results = json.loads((tmp_path / "p.json").read_text())
    assert [entry["image"].rpartition("val/")[2] for entry in results] == ["bee/003.jpg", "cat/003.jpg"]
