"""Checkpoints: what is saved is what is loaded, and nothing else passes."""

import numpy as np
import pytest

from src.models import build_model
from src.training.checkpoint import find_checkpoints, load_weights, read_checkpoint, save_checkpoint
from src.utils.errors import UserError


@pytest.fixture
def saved(tmp_path):
    network = build_model("cifar_quick", 10, "acb")
    path = tmp_path / "cifar_quick-1_5.ckpt"
    save_checkpoint(path, network.get_parameters(), {"epoch": 1, "note": "žluťoučký"})
    return network, path


def test_round_trip_is_exact(saved):
    network, path = saved
    arrays, metadata = read_checkpoint(path)
    assert metadata == {"epoch": 1, "note": "žluťoučký"}
    other = build_model("cifar_quick", 10, "acb")
    load_weights(other, arrays, path)
    for a, b in zip(network.get_parameters(), other.get_parameters()):
        assert a.name == b.name and np.array_equal(a.asnumpy(), b.asnumpy())


def test_nothing_but_the_checkpoint_is_left(saved):
    assert [file.name for file in saved[1].parent.iterdir()] == ["cifar_quick-1_5.ckpt"]


def test_truncated_checkpoint_is_refused(saved):
    content = saved[1].read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        saved[1].write_bytes(content[:length])
        with pytest.raises(UserError, match="truncated or not a MindSpore checkpoint"):
            read_checkpoint(saved[1])


def test_text_file_is_refused(tmp_path):
    (tmp_path / "x.ckpt").write_text("hello\n" * 100)
    with pytest.raises(UserError, match="not a MindSpore checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_other_network_is_refused_with_the_first_mismatches(saved):
    arrays, _ = read_checkpoint(saved[1])
    with pytest.raises(UserError, match="conv1.conv.weight is missing.* more"):
        load_weights(build_model("resnet18", 10), arrays, saved[1])


def test_other_class_count_loads_all_but_the_classifier_on_request(saved):
    network, path = saved
    arrays, _ = read_checkpoint(path)
    other = build_model("cifar_quick", 4, "acb")
    before = other.classifier.weight.asnumpy().copy()
    with pytest.raises(UserError, match="classifier.weight is .*allow_head_mismatch=1"):
        load_weights(other, arrays, path)
    assert load_weights(other, arrays, path, allow_head_mismatch=True) == ["classifier.bias", "classifier.weight"]
    assert np.array_equal(other.fc1.weight.asnumpy(), network.fc1.weight.asnumpy())
    assert np.array_equal(other.classifier.weight.asnumpy(), before)


def test_missing_files_are_named(tmp_path):
    for path, message in ((tmp_path / "none.ckpt", "does not exist"), (tmp_path, "no .ckpt file"), ("", "no checkpoint given")):
        with pytest.raises(UserError, match=message):
            find_checkpoints(path)


def test_unwritable_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "file" / "a.ckpt", [], {})
