"""Packed data sets: the same images as the folder's, complete or refused."""

import os
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, execute, make_config, write_image_folder

from src.dataset.batches import TrainBatches
from src.dataset.decoding import BadImage
from src.dataset.image_set import ImageSet, duplicate_messages, overlap_message
from src.dataset.packed import PackedImages, pack, part_name
from src.dataset.sources import open_images
from src.dataset.splits import validation_path
from src.models.weight_files import read_weights
from src.utils.errors import UserError


@pytest.fixture
def images(image_root):
    return open_images(str(image_root / "train"), "train")


def packed_into(path, images, short_side=0, part_images=20):
    written = []
    pack(images, path, short_side, 90, 2, written.append, part_images)
    assert sum(written) == len(images)
    return open_images(str(path), "train")


def test_packed_batches_are_those_of_the_folder(images, tmp_path):
    folder = tmp_path / "a folder, 50 % #1?"
    folder.mkdir()
    packed = packed_into(folder / "train.safetensors", images)
    assert set(os.listdir(folder)) == {
        "train.safetensors",
        "train.safetensors.1",
        "train.safetensors.2",
    }
    config = make_config(image_size=32, per_batch_size=7, max_epoch=2)
    ours, theirs = TrainBatches(packed, config, 0, 1), TrainBatches(images, config, 0, 1)
    assert len(ours) == len(theirs) and packed.class_to_index == images.class_to_index
    for item in range(len(ours)):
        assert np.array_equal(ours[item].images, theirs[item].images) and np.array_equal(
            ours[item].labels, theirs[item].labels
        )


def test_a_folder_of_two_packed_sets_is_a_root(images, image_root, tmp_path):
    packed_into(tmp_path / "train.safetensors", images)
    validation = open_images(str(image_root / "val"), "val")
    assert validation_path(str(tmp_path)) is None
    packed_into(tmp_path / "valid.safetensors", validation)
    assert validation_path(str(tmp_path)) == str(tmp_path)
    for split, expected in (("train", images), ("val", validation)):
        found = open_images(str(tmp_path), split)
        assert np.array_equal(found.labels, expected.labels) and found.packed is not None
    # Next to class folders a packed set is another form of them.
    shutil.copytree(image_root / "train", tmp_path / "train")
    assert open_images(str(tmp_path), "train").packed is None


def test_the_safetensors_library_reads_the_same(images, tmp_path):
    packed_into(tmp_path / "a.safetensors", images, part_images=100)
    tensors = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert tensors["labels"].tolist() == images.labels.tolist()
    for index, path in enumerate(images.paths):
        assert (
            tensors["images"][tensors["ends"][index] : tensors["ends"][index + 1]].tobytes()
            == open(path, "rb").read()
        )


def test_long_images_are_resized_and_short_ones_keep_their_bytes(tmp_path):
    write_image_folder(tmp_path, "train", ("a",), 2, size=(80, 50))
    cv2.imwrite(str(tmp_path / "train" / "a" / "small.png"), np.zeros((20, 30, 3), np.uint8))
    images = open_images(str(tmp_path / "train"), "train")
    packed = packed_into(tmp_path / "a.safetensors", images, short_side=25)
    assert [packed.load(index).shape for index in range(3)] == [
        (25, 40, 3),
        (25, 40, 3),
        (20, 30, 3),
    ]
    assert packed.packed.encoded(2).tobytes() == open(images.paths[2], "rb").read()
    # Resizing keeps the picture: mean colours agree to a grey level or two.
    assert np.abs(packed.load(0).mean(axis=(0, 1)) - images.load(0).mean(axis=(0, 1))).max() < 2


def test_a_picture_too_wide_for_jpeg_is_named(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "data" / "a" / "wide.png"), np.zeros((257, 70000, 3), np.uint8))
    images = open_images(str(tmp_path / "data"), "train")
    with pytest.raises(UserError, match="wide.png would have .* a JPEG has at most 65500"):
        pack(images, str(tmp_path / "a.safetensors"), 256, 90, 1, lambda count: None)


def test_interrupted_packing_keeps_whole_parts(images, tmp_path):
    path = tmp_path / "train.safetensors"
    packed_into(path, images)
    times = {number: os.stat(part_name(path, number)).st_mtime_ns for number in range(3)}
    os.unlink(part_name(path, 1))
    with pytest.raises(UserError, match=r"train.safetensors.1' is missing"):
        PackedImages(path)
    packed_into(path, images)
    after = {number: os.stat(part_name(path, number)).st_mtime_ns for number in range(3)}
    assert after[0] == times[0] and after[2] == times[2] and after[1] != times[1]
    other = tmp_path / "other.safetensors"
    pack(images, other, 0, 80, 2, lambda images: None, 20)
    shutil.copy(part_name(other, 1), part_name(path, 1))
    with pytest.raises(UserError, match=r"train.safetensors.1' is a part of another set"):
        PackedImages(path)
    with pytest.raises(UserError, match="with other images or options"):
        packed_into(path, images, short_side=25)


def test_a_changed_image_is_not_taken_for_packed(images, tmp_path):
    copies = []
    for number, path in enumerate(images.paths[:3]):
        copies.append(str(tmp_path / f"{number}.jpg"))
        shutil.copy(path, copies[-1])
    images = replace(images.at(np.arange(3)), paths=copies)
    packed_into(tmp_path / "a.safetensors", images)
    packed_into(tmp_path / "a.safetensors", images)
    shutil.copy(copies[1], copies[0])
    with pytest.raises(UserError, match="a.safetensors' already exists, with other images"):
        packed_into(tmp_path / "a.safetensors", images)


def test_damaged_and_foreign_files_are_refused(images, tmp_path):
    path = tmp_path / "train.safetensors"
    packed_into(path, images, part_images=100)
    content = path.read_bytes()
    tensors, about = (
        safetensors.numpy.load_file(path),
        safetensors.safe_open(path, "numpy").metadata(),
    )
    foreign = (
        ({}, about),
        (tensors, {}),
        ({**tensors, "ends": tensors["ends"] - 1}, about),
        ({**tensors, "ends": tensors["ends"][::-1].copy()}, about),
        ({**tensors, "ends": tensors["ends"].astype(np.uint64)}, about),
        (
            tensors,
            {**about, "description": about["description"].replace('"parts": 1', '"parts": "1"')},
        ),
        ({**tensors, "labels": tensors["labels"] + 9}, about),
        ({**tensors, "labels": tensors["labels"][1:]}, about),
        (tensors, {**about, "names": "[" * 5000}),
        (tensors, {**about, "description": "[]"}),
        (
            tensors,
            {
                **about,
                "description": about["description"].replace('"ant": 0', '"ant": 0, "x": 1000000'),
            },
        ),
    )
    for damaged in (
        b"",
        b"text",
        content[:100],
        content[:-1],
        b"\xff" * 8 + content[8:],
        *(safetensors.numpy.save(*written) for written in foreign),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train.safetensors' is .*damaged.*pack_dataset"):
            open_images(str(path), "train")
        with pytest.raises(UserError, match="already exists"):
            packed_into(path, images, part_images=100)
        assert path.read_bytes() == damaged


def test_no_byte_can_change_unnoticed(images, tmp_path):
    path = tmp_path / "train.safetensors"
    images = images.at(np.arange(8))
    packed_into(path, images)
    content, random = path.read_bytes(), np.random.default_rng(0)
    named = 0
    for place in random.integers(0, len(content), 300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            packed = open_images(str(path), "train")
        except UserError:
            continue
        with pytest.raises(BadImage, match=r"[^/]+/[^/]+ in .*train.safetensors has changed"):
            for index in range(len(packed)):
                packed.load(index)
        named += 1
    assert named > 150


def test_a_set_without_checksums_is_read(images, tmp_path):
    path = tmp_path / "train.safetensors"
    packed_into(path, images)
    tensors, index = (
        safetensors.numpy.load_file(path),
        safetensors.safe_open(path, "numpy").metadata(),
    )
    del tensors["checksums"], index["checksum"]
    safetensors.numpy.save_file(tensors, path, index)
    assert np.array_equal(open_images(str(path), "train").load(3), images.load(3))


def test_a_packed_list_keeps_the_labels_of_the_list(images, tmp_path):
    """Its class names are only the numbers of the labels, and folders of numbers are sorted."""
    for index, path in enumerate(images.paths[:3]):
        shutil.copy(path, tmp_path / f"{index}.jpg")
    (tmp_path / "list.txt").write_text("0.jpg 0\n1.jpg 2\n2.jpg 10\n")
    listed = open_images(str(tmp_path / "list.txt"), "train")
    packed = packed_into(tmp_path / "a.safetensors", listed)
    assert packed.is_list and packed.labels.tolist() == [0, 2, 10]
    known = {name: label for label, name in enumerate(sorted(map(str, range(12))))}
    of_training = open_images(str(tmp_path / "a.safetensors"), "val", class_to_index=known)
    again = open_images(str(tmp_path / "list.txt"), "val", class_to_index=known)
    assert of_training.labels.tolist() == again.labels.tolist() == [0, 2, 10]
    with pytest.raises(UserError, match="label 10, outside the 3 training classes"):
        open_images(str(tmp_path / "a.safetensors"), "val", class_to_index={"x": 0, "y": 1, "z": 2})


def test_packing_tells_what_is_left_out(broken_copy, tmp_path):
    first = next((broken_copy / "train" / "ant").iterdir())
    shutil.copy(first, first.with_suffix(".jp2"))
    target = f"--result_path={tmp_path}/a.safetensors"
    run = execute(
        ["python3", "scripts/pack_dataset.py", f"--data_path={broken_copy}/train", target]
    )
    assert run.status == 0 and "warning: left out of the training images: 1 " in run.out, run


def test_a_set_is_known_by_its_name_or_by_what_it_is_said_to_be(images, tmp_path):
    packed_into(tmp_path / "TRAIN.SAFETENSORS", images)
    for number in range(3):
        os.rename(
            part_name(tmp_path / "TRAIN.SAFETENSORS", number),
            part_name(tmp_path / "renamed", number),
        )
    assert len(open_images(str(tmp_path / "renamed"), "train", "packed")) == len(images)


def test_a_part_and_a_set_in_place_of_weights_are_named(images, tmp_path):
    packed_into(tmp_path / "a.safetensors", images)
    with pytest.raises(UserError, match="part of a packed set; name its first file, a.safetensors"):
        open_images(str(tmp_path / "a.safetensors.1"), "train")
    with pytest.raises(UserError, match="is a packed data set, not weights; it is for --data_path"):
        read_weights(tmp_path / "a.safetensors")


def test_a_set_of_the_earlier_format_says_what_to_do(tmp_path):
    (tmp_path / "train.mindrecord").write_bytes(b"\x20" + bytes(100))
    with pytest.raises(UserError, match="pack it again with scripts/pack_dataset.py"):
        open_images(str(tmp_path / "train.mindrecord"), "train")


@pytest.mark.slow
def test_training_from_packed_files_is_training_from_the_folder(image_root, tmp_path):
    for split in ("train", "val"):
        run = execute(
            [
                "python3",
                "scripts/pack_dataset.py",
                f"--data_path={image_root}",
                f"--split={split}",
                f"--result_path={tmp_path}/{split}.safetensors",
            ]
        )
        assert run.status == 0 and "verified" in run.out, run
    metrics = []
    for number, data in enumerate((f"{image_root}/train", f"{tmp_path}/train.safetensors")):
        run = execute(
            [
                "python3",
                "train.py",
                f"--data_path={data}",
                f"--output_path={tmp_path}/{number}",
                *TINY,
                "--max_epoch=2",
                "--lr=0.02",
                "--run_eval=1",
            ]
        )
        assert run.status == 0, run
        metrics.append(
            [
                line.rpartition("images/s")[2] + line.partition(" images/s")[0].rpartition(" ")[0]
                for line in run.out.splitlines()
                if line.startswith("epoch ") and "TOP1" in line
            ]
        )
    assert metrics[0] == metrics[1] and len(metrics[0]) == 2


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--data_path=/nowhere", "--result_path=a.safetensors"], "/nowhere"),
        (["--data_path=digits"], "--result_path"),
        (["--data_path=digits", "--result_path=a.mindrecord"], "must end"),
        (
            ["--data_path=digits", "--result_path=/proc/none/a.safetensors"],
            "cannot write '/proc/none/a.safetensors'",
        ),
        (
            ["--data_path=digits", "--result_path=/etc/passwd/a.safetensors"],
            "cannot write '/etc/passwd/a.safetensors'",
        ),
        (["--data_path=digits", f"--result_path={'a' * 243}.safetensors"], "File name too long"),
        (["--data_path=digits", "--result_path=a.safetensors", "--quality=101"], "--quality"),
    ],
)
def test_wrong_packing_commands_are_one_line(tmp_path, flags, words):
    from conftest import ROOT

    run = execute(["python3", ROOT / "scripts" / "pack_dataset.py", *flags], cwd=tmp_path)
    assert run.status == 2 and len(run.error_lines) == 1 and words in run.error_lines[0], run
    assert not list(tmp_path.iterdir())


def test_a_set_that_was_packed_with_other_options_is_another_set(images, tmp_path):
    """A run was resumed on it without a word."""
    sets = [
        packed_into(tmp_path / f"{side}.safetensors", images, short_side=side) for side in (0, 20)
    ]
    assert sets[0].fingerprint() != sets[1].fingerprint()
    again = packed_into(tmp_path / "again.safetensors", images, short_side=20)
    assert again.fingerprint() == sets[1].fingerprint()


def test_copies_are_recognised_in_packed_sets_too(images, tmp_path):
    packed = packed_into(tmp_path / "val.safetensors", images.at(np.arange(5, 12)))
    message = overlap_message(images, packed)
    assert message and message.startswith("warning: 7 of 7 validation images are training images")
    (message,) = duplicate_messages(images.at(np.arange(8)), packed)
    assert "3 of 7 validation images" in message
    pixels = ImageSet({"a": 0}, np.zeros(3, np.int32), pixels=np.eye(3, dtype=np.uint8)[..., None])
    assert "1 of 1" in (overlap_message(pixels, pixels.at(np.array([1]))) or "")
    assert overlap_message(pixels.at(np.array([0, 2])), pixels.at(np.array([1]))) is None
