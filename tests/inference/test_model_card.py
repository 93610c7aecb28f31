"""The model card that export.py writes."""

import json
import re
from types import SimpleNamespace

from conftest import execute

from src.inference.metrics import interval
from src.inference.model_card import _repetition


def exported(folder, checkpoint, *flags):
    """The text of the card of an exported file."""
    file = folder / "net.safetensors"
    command = ["python3", "export.py", f"--checkpoint_file_path={checkpoint}", *flags]
    run = execute([*command, "--file_format=SAFETENSORS", f"--result_path={file}"])
    assert run.status == 0 and run.out.splitlines()[-1].endswith(f"{file}.md"), run
    return (folder / "net.safetensors.md").read_text()


def test_it_says_what_the_run_recorded(trained_run, image_root, tmp_path):
    card = exported(tmp_path, trained_run / "best.ckpt")
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["top1"], -line["val_loss"]))
    low, high = interval(best["correct"], 67)
    assert f"{best['correct']} of 67 validation images are right: {best['top1']:.2f} %" in card
    assert f"interval {low:.1f} to {high:.1f} %), after epoch {best['epoch']}" in card
    assert f"Trained on `{image_root}/train`." in card and f"`{image_root}/val`" in card
    assert "cifar_quick for 3 classes" in card and "\nant, bee, cat\n" in card
    assert "[0.5, 0.5, 0.5] subtracted" in card and "Trained from random weights" in card
    assert f"--config_path={trained_run}/config.yaml" in card and "mindspore 2" in card
    assert 0 <= float(re.search(r"by at most (\S+) of the largest", card)[1]) < 1e-4


def test_flags_of_the_export_change_neither_the_data_nor_the_figures(trained_run, tmp_path):
    card = exported(tmp_path, trained_run / "best.ckpt", "--data_path=digits", "--crop_pct=0.9")
    assert "digits" not in card and "images0/train`" in card
    assert "None: training evaluated with other values of crop_pct." in card


def test_a_checkpoint_without_its_run_claims_no_figure(trained_run, tmp_path):
    (tmp_path / "a.ckpt").write_bytes((trained_run / "best.ckpt").read_bytes())
    card = exported(tmp_path, tmp_path / "a.ckpt")
    assert "Not evaluated in training" in card and "The run's folder is not known" in card
    assert "right" not in card


def test_the_command_that_repeats_a_run_has_its_ranks():
    """Its batch is that of all ranks together."""
    folder = SimpleNamespace(config="r/config.yaml", read_environment=dict)
    text = _repetition(folder, {"step": 5, "world_size": 2})
    command = "mpirun -n 2 python3 train.py --config_path=r/config.yaml --run_distribute=1"
    assert text.startswith(f"`{command}` up to step 5")
    assert _repetition(folder, {"step": 5, "world_size": 1}).startswith("`python3 train.py")
