"""Checkpoints on disk."""

import pytest

from src.models import build_model
from src.training.checkpoint import find_checkpoints, save_checkpoint
from src.utils.errors import UserError


def test_nothing_but_the_checkpoint_is_left(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", build_model("cifar_quick", 10).get_parameters(), {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_missing_files_are_named(tmp_path):
    for path, message in ((tmp_path / "none.ckpt", "does not exist"), (tmp_path, "no .ckpt file"), ("", "no checkpoint given")):
        with pytest.raises(UserError, match=message):
            find_checkpoints(path)


def test_unwritable_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "a.ckpt", [], {})
