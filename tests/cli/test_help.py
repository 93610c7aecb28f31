"""What --help and --list print."""

import pytest
import yaml
from conftest import ROOT, execute, mpirun

from src.cli.config import (
    GROUPS,
    Config,
    default_text,
    default_yaml,
    key_info,
    type_text,
    validated,
)
from src.cli.flags import suggest_key
from src.cli.help import help_text, list_text
from src.models.networks import NETWORKS


def test_every_key_has_a_group_its_default_and_a_line_of_help():
    defaults = yaml.safe_load((ROOT / "default_config.yaml").read_text())
    assert list(defaults) == [name for group in GROUPS for name in group.model_fields]
    assert set(defaults) == set(Config.model_fields)
    for key, value in defaults.items():
        assert yaml.safe_load(default_text(key)) == value, key
        assert len(key_info(key).help) > 5, key
    text = help_text("about", "train")
    assert all(f"\n  --{key}=" in text for key in defaults)
    groups = (
        "Network",
        "Data",
        "Augmentation in training",
        "Preprocessing in evaluation",
        "Device",
        "Optimization",
        "Checkpoints, evaluation, output",
    )
    assert all(f"\n\n{group}\n" in text for group in groups)


def test_the_file_of_defaults_is_up_to_date():
    """`python3 -m src.cli.config > default_config.yaml` writes it."""
    assert (ROOT / "default_config.yaml").read_text() == default_yaml()
    assert validated(yaml.safe_load(default_yaml())) == Config()


@pytest.mark.parametrize(
    "command,some,others",
    [
        ("train", {"lr", "run_eval", "top_k", "weight_init"}, set()),
        (
            "predict",
            {"top_k", "checkpoint_file_path", "image_size"},
            {"lr", "augmentations", "ckpt_interval", "port", "weight_init"},
        ),
        ("serve", {"port", "class_names"}, {"lr", "run_eval", "file_format"}),
        ("export", {"quantize", "fuse"}, {"momentum", "port", "top_k"}),
        ("report", {"result_path", "data_path"}, {"lr", "quantize"}),
        ("preview_dataset", {"augmentations", "crop_scale"}, {"lr", "loss_scale"}),
    ],
)
def test_help_of_a_command_has_its_keys_and_not_those_of_training(command, some, others):
    text = help_text("about", command=command)
    assert all(f"\n  --{key}=" in text for key in some) and not any(
        f"\n  --{key}=" in text for key in others
    )


def test_types_are_those_that_are_validated():
    kinds = {name: type_text(field.annotation) for name, field in Config.model_fields.items()}
    assert (
        kinds["kernels"] == "auto|onednn|mindspore"
        and kinds["run_eval"] == "0|1"
        and kinds["run_distribute"] == "0|1|null"
    )
    assert (
        kinds["lr"] == "NUMBER"
        and kinds["max_epoch"] == "INT"
        and kinds["mean"] == "LIST"
        and kinds["device_id"] == "INT|null"
    )


@pytest.mark.parametrize(
    "word,key",
    [
        ("workers", "num_parallel_workers"),
        ("model", "network"),
        ("modle", "network"),
        ("learning_rate", "lr"),
        ("weigth_decay", "weight_decay"),
        ("img_size", "image_size"),
        ("xyzzy", None),
        ("nothing", None),
    ],
)
def test_words_of_other_programs_are_understood(word, key):
    assert suggest_key(word) == (f" (did you mean '{key}'?)" if key else "")


def test_the_list_has_every_network_and_recipe():
    text = list_text()
    assert all(f"\n  {name} " in text for name in NETWORKS)
    assert all(file.stem in text for file in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("script", ["train.py", "eval.py", "export.py", "predict.py"])
def test_every_command_has_help_of_a_key(script):
    run = execute(["python3", script, "--help", "data_dir"])
    assert (
        run.status == 0
        and run.out.startswith("--data_path=TEXT\n")
        and "also: --data_dir" in run.out
    ), run


@pytest.mark.slow
def test_ranks_print_it_once():
    run = mpirun(2, "train.py", "--list")
    assert run.status == 0 and run.out.count("Recipes (") == 1, run
