"""predict.py: any picture, probabilities, class names."""

import csv
import json
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from conftest import ROOT, execute, user_environment
from PIL import Image

from src.inference.prediction import find_images


def test_predictions_as_json_and_sheet(trained_run, image_root, tmp_path):
    run = execute(
        [
            "python3",
            "predict.py",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"{image_root}/val/bee",
            f"{image_root}/val/cat/003.jpg",
            f"--result_path={tmp_path}/p.json",
            f"--save_figure={tmp_path}/sheet.png",
        ]
    )
    assert run.status == 0, run
    results = json.loads((tmp_path / "p.json").read_text())
    assert len(results) == 24 and results[-1]["image"].endswith("cat/003.jpg")
    probabilities = [entry["probability"] for entry in results[0]["predictions"]]
    assert len(probabilities) == 3 and sum(probabilities) == pytest.approx(1, abs=1e-4)
    assert probabilities == sorted(probabilities, reverse=True)
    best = [entry["predictions"][0]["class"] for entry in results]
    assert (
        set(best) <= {"ant", "bee", "cat"} and np.mean([name == "bee" for name in best[:-1]]) > 0.9
    )
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000


@pytest.mark.parametrize(
    "arguments,word",
    [([], "no image given"), (["/nowhere.jpg"], "/nowhere.jpg"), (["README.md"], "README.md")],
)
def test_wrong_image_is_one_line(trained_run, arguments, word):
    run = execute(
        ["python3", "predict.py", f"--checkpoint_file_path={trained_run}/best.ckpt", *arguments]
    )
    assert run.status == 2 and len(run.error_lines) == 1 and word in run.error_lines[0], run


@pytest.mark.parametrize("key,name", [("save_figure", "x.png"), ("result_path", "x.json")])
def test_no_result_replaces_an_image(trained_run, image_root, tmp_path, key, name):
    shutil.copy(image_root / "val" / "bee" / "003.jpg", tmp_path / name)
    before = (tmp_path / name).read_bytes()
    words = [f"--checkpoint_file_path={trained_run}/best.ckpt", f"--{key}={tmp_path}/{name}"]
    run = execute(["python3", "predict.py", *words, tmp_path / name])
    assert run.status == 2 and "would replace an image" in run.error_lines[0], run
    assert (tmp_path / name).read_bytes() == before


def test_one_bad_file_does_not_silence_the_others(trained_run, image_root, tmp_path):
    (tmp_path / "bad.jpg").write_text("text")
    run = execute(
        [
            "python3",
            "predict.py",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"{image_root}/val/bee/003.jpg",
            f"{tmp_path}/bad.jpg",
            f"{image_root}/val/cat/003.jpg",
            f"--result_path={tmp_path}/p.json",
        ]
    )
    assert (
        run.status == 1
        and len(run.error_lines) == 1
        and "1 of 3 images" in run.error_lines[0]
        and "bad.jpg" in run.error_lines[0]
    ), run
    results = json.loads((tmp_path / "p.json").read_text())
    assert [entry["image"].rpartition("val/")[2] for entry in results] == [
        "bee/003.jpg",
        "cat/003.jpg",
    ]


@pytest.fixture(scope="module")
def predict(trained_run):
    def run(*words, **options):
        return execute(
            ["python3", "predict.py", f"--checkpoint_file_path={trained_run}/best.ckpt", *words],
            **options,
        )

    return run


@pytest.mark.slow
def test_a_list_and_tables(predict, image_root, tmp_path):
    (tmp_path / "list.txt").write_text(f"{image_root}/val/bee/003.jpg\n\nbeside.jpg\n")
    shutil.copy(image_root / "val" / "cat" / "003.jpg", tmp_path / "beside.jpg")
    run = predict(f"{tmp_path}/list.txt", "--top_k=2", f"--result_path={tmp_path}/p.csv")
    assert run.status == 0, run
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["image"] for row in rows] == [f"{image_root}/val/bee/003.jpg"] * 2 + [
        f"{tmp_path}/beside.jpg"
    ] * 2
    assert [row["place"] for row in rows] == ["1", "2"] * 2 and (
        rows[0]["class"],
        rows[2]["class"],
    ) == ("bee", "cat")
    run = predict(f"{tmp_path}/list.txt", f"--result_path={tmp_path}/p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert run.status == 0 and [line["predictions"][0]["class"] for line in lines] == [
        "bee",
        "cat",
    ], run
    assert [len(line["predictions"]) for line in lines] == [3, 3]


@pytest.mark.slow
def test_what_is_less_probable_than_asked_for_is_marked(predict, image_root, tmp_path):
    folder = f"{image_root}/val"
    assert predict(folder, f"--result_path={tmp_path}/all.json").status == 0
    entries = json.loads((tmp_path / "all.json").read_text())
    assert not any("unsure" in entry for entry in entries)
    likeliest = [entry["predictions"][0]["probability"] for entry in entries]
    limit = round(float(np.median(likeliest)), 3)
    expected = [probability < limit for probability in likeliest]
    assert 0 < sum(expected) < 67
    run = predict(folder, f"--unsure={limit}", f"--result_path={tmp_path}/p.json")
    marks = [entry["unsure"] for entry in json.loads((tmp_path / "p.json").read_text())]
    assert marks == expected and f"{sum(expected)} of 67 predictions are unsure" in run.out, run
    run = predict(folder, f"--unsure={limit}", f"--result_path={tmp_path}/p.csv")
    rows = [row for row in csv.DictReader((tmp_path / "p.csv").open()) if row["place"] == "1"]
    assert run.status == 0 and [row["unsure"] == "1" for row in rows] == expected
    run = predict(folder, f"--unsure={limit}")
    assert run.out.count("  unsure: ") == sum(expected), run


def test_a_list_names_the_files_next_to_it(tmp_path, monkeypatch):
    """Also if the working folder has files of the same names; some editors add a mark."""
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        (folder / "x.jpg").write_bytes(b"")
    (tmp_path / "y.jpg").write_bytes(b"")
    (tmp_path / "other" / "list.txt").write_text("x.jpg\ny.jpg\n", encoding="utf-8-sig")
    monkeypatch.chdir(tmp_path)
    assert find_images(["other/list.txt"]) == ["other/x.jpg", "y.jpg"]


def test_a_list_on_standard_input(trained_run, image_root):
    names = sorted(map(str, (image_root / "val" / "ant").iterdir()))[:3]
    finished = subprocess.run(
        ["python3", "predict.py", f"--checkpoint_file_path={trained_run}/best.ckpt", "-"],
        cwd=ROOT,
        text=True,
        input="\n".join(names),
        capture_output=True,
        env=user_environment(),
    )
    assert (
        finished.returncode == 0
        and [line.split()[0] for line in finished.stdout.splitlines()] == names
    ), finished


@pytest.mark.extended
def test_what_a_list_names_and_is_not_there_keeps_nothing_from_being_classified(
    predict, image_root, tmp_path
):
    (tmp_path / "list.txt").write_text(f"nowhere.jpg\n{image_root}/val/bee/003.jpg\n")
    run = predict(f"{tmp_path}/list.txt", f"--result_path={tmp_path}/p.jsonl")
    assert (
        run.status == 1
        and "1 of 2 images" in run.error_lines[0]
        and "nowhere.jpg" in run.error_lines[0]
    ), run
    assert [json.loads(line)["image"] for line in (tmp_path / "p.jsonl").open()] == [
        f"{image_root}/val/bee/003.jpg"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text,word", [("", "names no image"), ("nowhere.jpg\n", "nowhere.jpg', which does not exist")]
)
def test_a_wrong_list_is_one_line(predict, tmp_path, text, word):
    (tmp_path / "list.txt").write_text(text)
    run = predict(f"{tmp_path}/list.txt")
    assert run.status == 2 and len(run.error_lines) == 1 and word in run.error_lines[0], run


@pytest.mark.slow
def test_the_mean_over_mirror_images(predict, image_root, tmp_path):
    """An image and its mirror image are then the same to any network."""
    image = cv2.imread(str(image_root / "val" / "bee" / "003.jpg"))
    cv2.imwrite(str(tmp_path / "a.png"), image)
    cv2.imwrite(str(tmp_path / "b.png"), image[:, ::-1])
    found = {}
    for flip in (0, 1):
        run = predict(
            f"{tmp_path}/a.png",
            f"{tmp_path}/b.png",
            f"--test_flip={flip}",
            f"--result_path={tmp_path}/p.json",
        )
        assert run.status == 0, run
        found[flip] = [
            [(entry["class"], entry["probability"]) for entry in one["predictions"]]
            for one in json.loads((tmp_path / "p.json").read_text())
        ]
    assert found[0][0] != found[0][1]
    assert dict(found[1][0]) == pytest.approx(dict(found[1][1]), abs=2e-6)


@pytest.mark.slow
def test_names_from_a_file(predict, image_root, tmp_path):
    (tmp_path / "names.txt").write_text("Ameise\nBiene\nKatze\n")
    run = predict(f"{image_root}/val/bee/003.jpg", f"--class_names={tmp_path}/names.txt")
    assert run.status == 0 and run.out.split()[1] == "Biene", run
    (tmp_path / "names.txt").write_text("Ameise\n")
    run = predict(f"{image_root}/val/bee/003.jpg", f"--class_names={tmp_path}/names.txt")
    assert run.status == 2 and len(run.error_lines) == 1 and "has 1 names" in run.error_lines[0], (
        run
    )
