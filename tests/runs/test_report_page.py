"""report.py: one page that opens from disk, and says what metrics.jsonl says."""

import html
import json
import re
import shutil

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from conftest import TINY, execute, only_run
from PIL import Image

from src.inference.metrics import interval
from src.runs.report_page import line_chart, most_shown


@pytest.fixture(scope="module")
def page(trained_run):
    run = execute(["python3", "report.py", trained_run])
    assert run.status == 0 and run.out == f"report in {trained_run}/report.html\n", run
    yield trained_run / "report.html"
    (trained_run / "report.html").unlink()


def rows_of(text, name):
    """The cells of a table of the page."""
    body = re.search(rf'<table id="{name}">.*?<tbody>(.*?)</tbody>', text, re.S)[1]
    return [
        [
            html.unescape(re.sub(r"<.*?>", "", cell))
            for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.S)
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)
    ]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_figures_are_those_of_the_metrics(page, trained_run):
    text, metrics = page.read_text(), metrics_of(trained_run)
    best = max(metrics, key=lambda line: (line["top1"], -line["val_loss"]))
    (summary,) = rows_of(text, "summary")
    # Three classes: no top-5.
    assert summary[2:7] == [
        "2 of 2",
        f"{best['top1']:.2f} %",
        f"{best['top1'] * 67 / 100:.0f} of 67",
        str(best["epoch"]),
        f"{metrics[-1]['loss']:.4f}",
    ]
    assert "top-5" not in text
    assert [[float(cell) for cell in row] for row in rows_of(text, "epochs")] == [
        [line[key] for key in ("epoch", "loss", "val_loss", "top1", "lr", "images_per_second")]
        for line in metrics
    ]
    figures = {name: figures for name, *figures in rows_of(text, "classes")}
    recalls = {name: float(recall.rstrip(" %")) for name, (_, _, recall, _) in figures.items()}
    assert recalls == pytest.approx(dict(zip(("ant", "bee", "cat"), best["class_top1"])), abs=0.051)
    assert list(recalls.values()) == sorted(recalls.values())
    assert sum(int(images) for images, *_ in figures.values()) == 67
    # The confusion matrix is of the same network on the same images.
    body = text.partition('class="confusion"')[2].partition("<tbody>")[2].partition("</tbody>")[0]
    counts = np.array(
        [
            [int(cell or 0) for cell in re.findall(r"<td.*?>(\d*)</td>", row)]
            for row in re.findall(r"<tr><th>.*?</tr>", body)
        ]
    )
    assert counts.sum() == 67 and 100 * np.trace(counts) / 67 == pytest.approx(
        best["top1"], abs=1e-3
    )
    for label, name in enumerate(("ant", "bee", "cat")):
        taken = counts[:, label].sum()
        precision = f"{100 * counts[label, label] / taken:.1f} %" if taken else ""
        assert figures[name][1] == precision
    right = f"{np.trace(counts)} of 67 validation images are right"
    low, high = interval(int(np.trace(counts)), 67)
    assert f"<h1>{right}</h1>" in text and f"(95 % interval {low:.1f} to {high:.1f} %)" in text
    assert (
        f"program {json.loads((trained_run / 'environment.json').read_text())['program']}" in text
    )
    assert text.count("<img") == 24 + min(67 - np.trace(counts), 24)
    assert "other images than training evaluated" not in text


def test_the_configuration_shows_what_was_changed_and_nothing_else(page):
    changed = page.read_text().partition("Values that differ")[2].partition("</table>")[0]
    keys = re.findall(r"<tr><td><code>(\w+)</code>", changed)
    assert {"network", "block", "train_crop", "max_epoch", "lr", "image_size"} <= set(keys)
    assert not {"max_pixels", "crop_scale", "loss_scale", "seed", "stall_timeout_s"} & set(keys)


def test_mistakes_are_shown_with_their_files(trained_run, image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "images")
    val = tmp_path / "images" / "val"
    for old, new in (("ant", "x"), ("bee", "ant"), ("x", "bee")):
        (val / old).rename(val / new)
    command = ["python3", "report.py", trained_run, f"--data_path={tmp_path}/images/train"]
    run = execute([*command, f"--result_path={tmp_path}/report.html", "--heat_maps=2"])
    assert run.status == 0, run
    text = (tmp_path / "report.html").read_text()
    command = ["python3", "eval.py", f"--checkpoint_file_path={trained_run}/best.ckpt"]
    run_eval = execute([*command, f"--data_path={val}", f"--result_path={tmp_path}/e.json"])
    assert run_eval.status == 0, run_eval
    (result,) = json.loads((tmp_path / "e.json").read_text())
    (error,) = re.findall(r"off by ([\d.]+) percentage points", text)
    assert (
        float(error) == pytest.approx(result["calibration_error"], abs=0.06) and float(error) > 20
    )
    captions = re.findall(r'<span class="file" title="(.*?)">(.*?)</span>(.*?)</fig', text)
    assert captions and "other images than training evaluated" in text and "other images" in run.out
    for path, shown, words in captions:
        label, name = path.split("/")[-2:]
        assert path.startswith(str(val)) and shown == f"{label}/{name}"
        predicted, of_predicted, of_label = re.fullmatch(
            rf"predicted (\w+) (\d+) %, is {label} (\d+) %", words.removesuffix("</figcaption>")
        ).groups()
        assert predicted != label and int(of_predicted) >= int(of_label)
    figures = re.findall(r"<figure>.*?</figure>", text.partition("Most confident")[2])
    of_mistakes = figures[: len(captions)]
    assert [one.count("<img") for one in of_mistakes[:3]] == [2, 2, 1], "--heat_maps=2"


@pytest.mark.slow
def test_moved_images_are_split_as_training_split_them(image_root, tmp_path):
    """Also if there are validation images next to them, which training did not use."""
    shutil.copytree(image_root, tmp_path / "before")
    words = [f"--data_path={tmp_path}/before/train", f"--output_path={tmp_path}/out"]
    words += [*TINY, "--max_epoch=1", "--val_split=0.25"]
    assert execute(["python3", "train.py", *words]).status == 0
    (tmp_path / "before").rename(tmp_path / "after")
    command = ["python3", "report.py", only_run(tmp_path / "out")]
    run = execute([*command, f"--data_path={tmp_path}/after/train"])
    assert run.status == 0 and "other images" not in run.out, run


def test_images_that_cannot_be_decoded_are_said_to_be_missing(trained_run, image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "images")
    (tmp_path / "images/val/ant/005.jpg").write_text("no image")
    command = ["python3", "report.py", trained_run, f"--data_path={tmp_path}/images/train"]
    run = execute([*command, f"--result_path={tmp_path}/report.html"])
    assert run.status == 0, run
    text = (tmp_path / "report.html").read_text()
    assert "66 images are counted here, of 67 in training" in text


def test_a_damaged_best_checkpoint_leaves_the_rest_of_the_report(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "best.ckpt").unlink()
    (tmp_path / "run" / "best.ckpt").write_bytes(b"damaged")
    run = execute(["python3", "report.py", tmp_path / "run"])
    assert run.status == 0 and "the report is incomplete" in run.out, run
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Not everything could be shown" in text and rows_of(text, "summary")


def test_a_huge_loss_does_not_press_the_others_flat():
    usual = [(epoch, 2.0 - epoch / 20) for epoch in range(1, 20)]

    def chart(points):
        lines = [("run", points)]
        return line_chart("loss", lines, most=most_shown(lines))

    def spread(drawn):
        heights = [float(height) for height in re.findall(r'<circle .*?cy="([\d.]+)"', drawn)]
        return heights[-1] - heights[-19]

    whole, with_huge = chart(usual), chart([(0, 5000.0), *usual])
    assert spread(with_huge) > spread(whole) / 6
    assert "loss; 1 higher, up to 5000" in with_huge and "run, epoch 0: 5000<" in with_huge
    assert "higher" not in whole and most_shown([("run", [])]) == float("inf")


def test_it_is_one_file_without_script_and_network(page):
    text = page.read_text()
    assert "<script" not in text and "url(" not in text
    assert all(
        source.startswith("data:")
        for source in re.findall(r"""(?:src|href)=["']?([^"' >]*)""", text)
    )


@pytest.mark.slow
def test_runs_are_compared(trained_run, image_root, tmp_path):
    run = execute(
        [
            "python3",
            "train.py",
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}/other",
            *TINY,
            "--max_epoch=1",
            "--lr=0.03",
            "--run_eval=1",
            f"--eval_data_path={image_root}/train",
        ]
    )
    assert run.status == 0, run
    other = only_run(tmp_path / "other")
    run = execute(
        ["python3", "report.py", trained_run, other, f"--result_path={tmp_path}/both.html"]
    )
    assert run.status == 0 and "evaluated on different images" in run.out, run
    differing = {
        row[0]: row[1:] for row in rows_of((tmp_path / "both.html").read_text(), "differing")
    }
    assert "<code>[crop, flip" in (tmp_path / "both.html").read_text()
    assert (
        differing["lr"] == ["0.02", "0.03"]
        and differing["block"] == ["acb", "base"]
        and "image_size" not in differing
    )


@pytest.mark.slow
def test_images_that_are_gone_are_said_to_be(image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "images")
    run = execute(
        [
            "python3",
            "train.py",
            f"--data_path={tmp_path}/images/train",
            f"--output_path={tmp_path}/out",
            *TINY,
            "--max_epoch=1",
            "--run_eval=1",
        ]
    )
    assert run.status == 0, run
    shutil.rmtree(tmp_path / "images")
    run = execute(["python3", "report.py", only_run(tmp_path / "out")])
    text = (only_run(tmp_path / "out") / "report.html").read_text()
    assert (
        run.status == 0 and "does not exist" in run.out and "Not everything could be shown" in text
    ), run
    assert rows_of(text, "summary") and rows_of(text, "classes")


@pytest.mark.parametrize(
    "arguments,word",
    [
        ([], "no run given"),
        (["README.md"], "does not exist"),
        (["docs"], "not the folder of a run"),
        (["/nowhere"], "does not exist"),
    ],
)
def test_wrong_folders_are_one_line(arguments, word):
    run = execute(["python3", "report.py", *arguments])
    assert run.status == 2 and len(run.error_lines) == 1 and word in run.error_lines[0], run


@pytest.mark.extended
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width,dark", [(1200, False), (390, True)])
def test_in_a_browser(page, trained_run, tmp_path, width, dark):
    with Browser(tmp_path, width, 900, dark) as browser:
        browser.open(f"file://{page}")
        best = max(metrics_of(trained_run), key=lambda line: (line["top1"], -line["val_loss"]))
        assert (
            browser.run("document.querySelector('#summary tbody tr').cells[3].innerText")
            == f"{best['top1']:.2f} %"
        )
        # What is wider than the page scrolls within it.
        assert browser.run("document.documentElement.scrollWidth") == width
        assert (
            browser.run("[...document.images].every(image => image.naturalWidth > 0)")
            and browser.run("document.images.length") >= 24
        )
        assert browser.complaints == []
        browser.screenshot(tmp_path / "page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("L"), np.float32)
    assert (
        pixels.shape[1] == width
        and (np.median(pixels) < 60 if dark else np.median(pixels) > 200)
        and pixels.std() > 15
    )
