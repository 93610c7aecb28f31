"""Images that cannot be decoded.

Training replaces them, evaluation counts them as wrong, the checker lists them, and all tell.
"""

import json
import struct
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT, execute, make_config
from PIL import Image

from src.dataset.batches import PADDING_LABEL, UNDECODABLE_LABEL, EvalBatches, TrainBatches
from src.dataset.decoding import BadImage, read_image
from src.dataset.sources import open_images
from src.dataset.splits import open_all_parts, open_training_data
from src.distributed.communicator import Communicator
from src.utils.errors import UserError

KEYS = {"image_size": 32, "train_crop": "resize", "per_batch_size": 6}


@pytest.fixture
def damaged(broken_copy):
    """The class folders with three bad training images and one bad validation image."""
    train, val = broken_copy / "train", broken_copy / "val"
    whole = (train / "ant" / "000.jpg").read_bytes()
    (train / "ant" / "000.jpg").write_bytes(whole[:-90])
    (train / "bee" / "004.jpg").write_bytes(b"")
    (train / "bee" / "005.jpg").write_text("text")
    (val / "cat" / "000.jpg").write_bytes(whole[:200])
    return broken_copy


def bomb():
    """A PNG of some kilobytes that claims 40,000 x 40,000 pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def test_decompression_bomb_is_refused_by_its_size(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    with pytest.raises(BadImage, match="bomb.png has too many pixels"):
        read_image(str(tmp_path / "bomb.png"))


def test_each_replacement_of_a_repeated_image_counts(damaged):
    """Balanced sampling draws the single image of a class six times in 16."""
    for name in ("ant", "cat"):
        for file in sorted((damaged / "train" / name).iterdir())[6:]:
            file.unlink()
    for file in (damaged / "train" / "bee").iterdir():
        if file.name != "004.jpg":
            file.unlink()
    images = open_images(str(damaged / "train"), "train")
    keys = {**KEYS, "per_batch_size": len(images), "sampling": "balanced", "max_epoch": 1}
    source = TrainBatches(images, make_config(**keys, bad_samples="replace"), 0, 1)
    bad = {
        index
        for index in range(len(images))
        if images.name(index).endswith(("ant/000.jpg", "bee/004.jpg"))
    }
    drawn = sum(int(index) in bad for index in source.samples(0)[0])
    assert source[0].substituted == drawn > 4


@pytest.mark.parametrize("max_pixels,refused", [(31 * 31, True), (32 * 32, False)])
def test_the_limit_of_pixels_is_a_key(tmp_path, max_pixels, refused):
    (tmp_path / "ant").mkdir()
    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / "ant" / f"{name}.bmp")
    config = make_config(**KEYS, data_path=str(tmp_path), max_pixels=max_pixels)
    images = open_all_parts(config)["train"]
    if refused:
        with pytest.raises(BadImage, match="a.bmp has 32 x 32 pixels: too many.*--max_pixels"):
            images.load(0)
    else:
        assert images.load(0).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_too_little_memory_is_not_a_bad_image(tmp_path, mode):
    """Evaluation would count the image as wrong, and training replace it."""
    Image.new(mode, (8000, 8000)).save(tmp_path / "large.png", compress_level=1)
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from src.dataset.decoding import read_image
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
try:
    read_image({str(tmp_path / "large.png")!r})
except MemoryError:
    print("no memory")
"""
    run = execute([sys.executable, "-c", code])
    assert run.out == "no memory\n", run


class Rank(Communicator):
    """One of several ranks, which alone opens the images."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize(
    "rank,size,name",
    # 20 and 21 of 48 are bee/004 and bee/005; rank 2 of 4 has neither.
    [(0, 1, "ant/000.jpg"), (1, 2, "bee/005.jpg"), (1, 4, "bee/005.jpg"), (2, 4, None)],
)
def test_each_rank_finds_the_first_bad_image_of_its_shard(damaged, rank, size, name):
    config = make_config(**KEYS, data_path=f"{damaged}/train", max_epoch=1)
    if name is None:
        assert len(open_training_data(config, Rank(rank, size)).train) == 48
        return
    with pytest.raises(UserError, match=f"{name}.*--bad_samples=replace"):
        open_training_data(config, Rank(rank, size))


def test_error_names_the_file_and_how_to_go_on(damaged):
    images = open_images(str(damaged / "train"), "train")
    batches = TrainBatches(images, make_config(**KEYS, max_epoch=1), 0, 1)
    with pytest.raises(UserError, match=r"\.jpg .*--bad_samples=replace"):
        for item in range(len(batches)):
            batches[item]


def test_replacement_is_the_next_image_with_its_label_and_is_counted(damaged):
    images = open_images(str(damaged / "train"), "train")
    config = make_config(**KEYS, max_epoch=2, bad_samples="replace")
    batches, again = TrainBatches(images, config, 0, 1), TrainBatches(images, config, 0, 1)
    served = [batches[item] for item in range(len(batches))]
    for batch, other in zip(served, (again[item] for item in range(len(again)))):
        assert np.array_equal(batch.images, other.images) and np.array_equal(
            batch.labels, other.labels
        )
    assert (np.bincount(np.concatenate([batch.labels for batch in served[:8]]))).tolist() == [
        16,
        16,
        16,
    ]
    # The colour of the class is in the pixels: none is black, none shows another class than its
    # label.
    for batch in served:
        assert np.array_equal(batch.images.mean(axis=(1, 2)).argmax(axis=1), 2 - batch.labels)
    assert (
        sum(batch.substituted for batch in served[:8]) == 3
        and sum(batch.substituted for batch in served[8:]) == 3
    )


def test_undecodable_image_of_an_evaluation_is_named_and_counts(damaged):
    images = open_images(str(damaged / "val"), "val")
    batches = EvalBatches(images, make_config(**KEYS, eval_resize=32), 0, 1, 10)
    served = [batches[item] for item in range(len(batches))]
    labels = np.concatenate([batch.labels for batch in served])
    assert (labels == UNDECODABLE_LABEL).sum() == 1 and (labels != PADDING_LABEL).sum() == 67
    (message,) = sum((batch.undecodable for batch in served), ())
    assert "cat/000.jpg" in message


def test_evaluation_counts_it_as_wrong(trained_run, damaged, tmp_path):
    run = execute(
        [
            "python3",
            "eval.py",
            f"--data_path={damaged}/val",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"--result_path={tmp_path}/result.json",
        ]
    )
    assert (
        run.status == 0
        and "1 of 67 images cannot be decoded and count as wrong: " in run.out
        and "cat/000.jpg" in run.out
    ), run
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert (
        result["images"] == 67
        and result["undecodable"] == 1
        and result["top5"] == pytest.approx(100 * 66 / 67)
    )


def test_evaluation_of_nothing_but_bad_images_is_an_error(trained_run, image_root, tmp_path):
    (tmp_path / "ant").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "ant" / name).write_text("text")
    run = execute(
        [
            "python3",
            "eval.py",
            f"--data_path={tmp_path}",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
        ]
    )
    assert run.status == 2 and "none of the 2 images can be decoded" in run.error_lines[0], run


def test_checker_lists_every_bad_file(damaged, tmp_path):
    (damaged / "train" / "cat" / "bomb.png").write_bytes(bomb())
    corrupt = damaged / "val" / "bee" / "000.jpg"
    content = bytearray(corrupt.read_bytes())
    content[-200:-150] = b"\xff\x00" * 25
    corrupt.write_bytes(content)
    run = execute(
        [
            "python3",
            "scripts/check_dataset.py",
            f"--data_path={damaged}",
            f"--result_path={tmp_path}/found.json",
        ]
    )
    assert run.status == 1, run
    assert run.error_lines == ["error: 5 of 116 images cannot be decoded"], run
    assert (
        "check_dataset: 116 images, 5 cannot be decoded, 1 damaged" in run.out.splitlines()[-1]
    ), run
    found = {
        entry["path"].removeprefix(f"{damaged}/"): entry["bad"]
        for entry in json.loads((tmp_path / "found.json").read_text())
    }
    assert found == {
        "train/ant/000.jpg": True,
        "train/bee/004.jpg": True,
        "train/bee/005.jpg": True,
        "train/cat/bomb.png": True,
        "val/bee/000.jpg": False,
        "val/cat/000.jpg": True,
    }
    assert execute(["python3", "scripts/check_dataset.py", "--data_path=digits"]).status == 0
