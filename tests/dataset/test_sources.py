"""Where images come from, and the messages if they cannot be found."""

import os
import pickle
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import make_config
from hostile.layouts import check_layout, draw_layout
from PIL import Image

from src.dataset.cifar import CIFAR10
from src.dataset.decoding import read_image
from src.dataset.image_set import ImageSet
from src.dataset.sources import open_images
from src.dataset.splits import (
    empty_classes_message,
    left_out_message,
    nested_classes_message,
    open_all_parts,
    set_messages,
    validation_path,
)
from src.utils.errors import UserError

LABELLED = tuple(enumerate(("ant", "bee", "cat")))


def test_folder_labels_follow_sorted_class_names(image_root):
    images = open_images(str(image_root / "train"), "train")
    assert images.class_to_index == {"ant": 0, "bee": 1, "cat": 2}
    assert np.array_equal(images.labels, np.repeat([0, 1, 2], 16))


def test_root_stands_for_its_parts(image_root):
    assert len(open_images(str(image_root), "train")) == 48
    assert len(open_images(str(image_root), "val")) == 67


def test_missing_class_does_not_shift_labels(broken_copy):
    for file in (broken_copy / "val" / "bee").iterdir():
        file.unlink()
    (broken_copy / "val" / "bee").rmdir()
    images = open_images(
        str(broken_copy / "val"), "val", class_to_index={"ant": 0, "bee": 1, "cat": 2}
    )
    assert set(images.labels.tolist()) == {0, 2} and images.num_classes == 3


def test_list_file_takes_both_ways_of_writing_paths(image_root):
    (image_root / "train_list.txt").write_text("train/ant/000.jpg 0\nbee/001.jpg 1\n")
    images = open_images(str(image_root / "train_list.txt"), "train")
    (image_root / "train_list.txt").unlink()
    assert images.labels.tolist() == [0, 1] and images.class_to_index == {"ant": 0, "bee": 1}
    assert images.load(1).shape == (32, 40, 3)


@pytest.mark.parametrize("line", ["../outside.jpg 0", "/etc/passwd 0"])
def test_list_cannot_leave_its_folder(tmp_path, line):
    (tmp_path / "train_list.txt").write_text(line + "\n")
    with pytest.raises(UserError, match="outside the list's folder"):
        open_images(str(tmp_path), "train")


def test_bad_line_of_a_list_is_named(tmp_path):
    (tmp_path / "train_list.txt").write_text("a.jpg 0\nb.jpg\n")
    with pytest.raises(UserError, match="line 2"):
        open_images(str(tmp_path), "train")


def test_cifar10_binary_records(tmp_path):
    record = np.arange(3 * 32 * 32) % 251
    for number in range(1, 6):
        np.concatenate([[number], record]).astype(np.uint8).tofile(
            tmp_path / f"data_batch_{number}.bin"
        )
    images = open_images(str(tmp_path), "train")
    assert images.labels.tolist() == [1, 2, 3, 4, 5] and images.num_classes == 10
    # The format: 1,024 red, then green, then blue values, row by row (CIFAR-10 binary version).
    assert images.load(0)[0, 1].tolist() == [record[1], record[1024 + 1], record[2048 + 1]]


def test_truncated_cifar10_is_refused(tmp_path):
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(UserError, match="not a whole number"):
        open_images(str(tmp_path), "train")


PYTHON_10, PYTHON_100 = "cifar-10-batches-py", "cifar-100-python"


def write_python_cifar(folder, parts, labels, meta, names):
    """Files in the form of CIFAR's Python version; returns the pixels of all parts."""
    folder.mkdir()
    random, pixels = np.random.default_rng(0), []
    for number, part in enumerate(parts):
        pixels.append(random.integers(0, 256, (3, 3072), np.uint8))
        (folder / part).write_bytes(
            pickle.dumps(
                {labels: [number, 1, 2], "data": pixels[-1], "filenames": ["a", "b", "c"]},
                protocol=2,
            )
        )
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: names}, protocol=2))
    return np.concatenate(pixels)


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_in_its_python_form(tmp_path, inside):
    """CIFAR-10 as torchvision unpacks it, given by its folder or the one around it."""
    names = [f"kind{label}" for label in range(10)]
    parts = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    pixels = write_python_cifar(
        tmp_path / PYTHON_10, parts, "labels", ("batches.meta", "label_names"), names
    )
    place = str(tmp_path / PYTHON_10 if inside else tmp_path)
    train, val = open_images(place, "train"), open_images(place, "val")
    assert (
        (len(train), len(val)) == (15, 3)
        and list(train.class_to_index) == names
        and val.labels.tolist() == [5, 1, 2]
    )
    assert np.array_equal(train.load(4), pixels[4].reshape(3, 32, 32).transpose(1, 2, 0))
    assert validation_path(place) == place


def test_cifar100_in_both_forms(tmp_path):
    names = [f"kind{label}" for label in range(100)]
    pixels = write_python_cifar(
        tmp_path / PYTHON_100, ["train", "test"], "fine_labels", ("meta", "fine_label_names"), names
    )
    binary = tmp_path / "binary"
    binary.mkdir()
    for number, part in enumerate(("train", "test")):
        rows = [
            np.concatenate([[9, label], row])
            for label, row in zip((number, 1, 2), pixels[3 * number :])
        ]
        np.stack(rows).astype(np.uint8).tofile(binary / f"{part}.bin")
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    for part in ("train", "val"):
        python, of_binary = open_images(str(tmp_path), part), open_images(str(binary), part)
        assert python.num_classes == 100 and python.class_to_index == of_binary.class_to_index
        assert np.array_equal(python.labels, of_binary.labels) and np.array_equal(
            python.pixels, of_binary.pixels
        )


def write_binary_cifar100(folder, labels, names=()):
    """training images of these labels in CIFAR-100's binary form."""
    folder.mkdir()
    rows = [np.append([9, label], np.zeros(3072)).astype(np.uint8) for label in labels]
    np.stack(rows).tofile(folder / "train.bin")
    if names:
        (folder / "fine_label_names.txt").write_text("\n".join(names))
    return str(folder)


@pytest.mark.parametrize("named", [True, False])
def test_cifar100_follows_folders_that_are_its_labels(tmp_path, named):
    """Folders 0 to 99 are sorted as text in training, so that "10" is label 2."""
    of_training = {name: label for label, name in enumerate(sorted(map(str, range(100))))}
    names = [f"kind{label}" for label in range(100)] if named else ()
    path = write_binary_cifar100(tmp_path / "c", [0, 10, 99], names)
    images = open_images(path, "train", class_to_index=of_training)
    assert images.labels.tolist() == [0, 2, of_training["99"]]
    assert bool(images.notes) == named


def test_a_folder_with_both_cifars_is_refused(tmp_path):
    write_binary_cifar100(tmp_path / "cifar-100-binary", [1])
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").touch()
    with pytest.raises(UserError, match="both CIFAR-10 and CIFAR-100; .*--dataset_format=cifar10"):
        open_images(str(tmp_path), "train")
    assert len(open_images(str(tmp_path), "train", "cifar100")) == 1


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("keys", [str, str.encode])
def test_a_cifar_that_python_3_wrote_again_is_read(tmp_path, protocol, keys):
    """With numpy's own numbers as labels, and with the keys as bytes."""
    content = {
        keys("labels"): list(np.arange(3)),
        keys("data"): np.zeros((3, 3072), np.uint8),
        keys("filenames"): ["a", "b", "c"],
    }
    for number in range(1, 6):
        file = tmp_path / f"data_batch_{number}"
        file.write_bytes(pickle.dumps(content, protocol=protocol))
    assert open_images(str(tmp_path), "train").labels.tolist() == [0, 1, 2] * 5


def test_a_list_is_read_from_its_own_part(tmp_path):
    """Also by eval.py, which wants validation images."""
    for part in ("train", "val"):
        make_folders(tmp_path / part, "cat", "dog")
    (tmp_path / "train_list.txt").write_text("cat/a.png 0\ndog/a.png 1\n")
    images = open_images(str(tmp_path / "train_list.txt"), "val")
    assert all("/train/" in path for path in images.paths)


def test_a_folder_called_digits_is_spoken_of(tmp_path, monkeypatch):
    make_folders(tmp_path / "digits", "cat", "dog")
    assert not open_images("digits", "val").notes
    monkeypatch.chdir(tmp_path)
    images = open_images("digits", "val")
    assert images.num_classes == 10 and "--data_path=./digits is the folder" in images.notes[0]


class _Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "content,message",
    [
        (pickle.dumps(_Runs()), "posix.system|nt.system"),
        (pickle.dumps({"data": _Runs()}), "posix.system|nt.system"),
        (b"", "damaged"),
        (pickle.dumps({"labels": [1], "data": np.zeros((2, 3072), np.uint8)}), "does not hold"),
        (pickle.dumps([1]), "does not hold a table"),
        (pickle.dumps({"labels": [1], "data": np.zeros((1, 3072), np.float32)}), "does not hold"),
        (pickle.dumps({"data": 1}), "does not hold"),
        (pickle.dumps({"labels": [3.5], "data": np.zeros((1, 3072), np.uint8)}), "does not hold"),
        (
            pickle.dumps({"labels": [77], "data": np.zeros((1, 3072), np.uint8)}),
            "labels that CIFAR-10 does not have",
        ),
    ],
)
def test_a_python_cifar_that_is_damaged_or_would_run_code_is_refused(
    tmp_path, monkeypatch, content, message
):
    monkeypatch.chdir(tmp_path)
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}").write_bytes(content)
    (tmp_path / "batches.meta").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_images(str(tmp_path), "train", "cifar10")
    assert not (tmp_path / "ran").exists()


def test_a_split_is_stratified_repeats_and_shares_no_image():
    images = open_images("digits", "train")
    train, part = images.split(0.1, seed=7)
    assert sorted(train.paths + part.paths) == sorted(images.paths)
    assert part.class_to_index == images.class_to_index and part.num_classes == 10
    for label, count in enumerate(np.bincount(images.labels)):
        assert np.count_nonzero(part.labels == label) == round(0.1 * count)
    again, other = images.split(0.1, seed=7)[1], images.split(0.1, seed=8)[1]
    assert again.paths == part.paths and other.paths != part.paths
    assert all(
        part.labels[place] == images.labels[images.paths.index(path)]
        for place, path in enumerate(part.paths)
    )


def test_a_split_of_arrays_keeps_images_and_labels_together():
    pixels = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    images = ImageSet({"a": 0, "b": 1}, np.arange(20, dtype=np.int32) % 2, pixels=pixels)
    train, part = images.split(0.3, seed=1)
    deeper, deepest = train.split(0.5, seed=1)
    assert (len(train), len(part)) == (14, 6)
    for found in (train, part, deeper, deepest):
        assert [
            int(found.load(place)[0, 0, 0]) % 2 for place in range(len(found))
        ] == found.labels.tolist()
    seen = [
        int(found.load(place)[0, 0, 0])
        for found in (part, deeper, deepest)
        for place in range(len(found))
    ]
    assert sorted(seen) == list(range(20))


def test_the_only_image_of_a_class_stays_in_training():
    images = ImageSet({"a": 0, "b": 1}, np.array([0, 0, 0, 1], np.int32), paths=list("wxyz"))
    train, part = images.split(0.9, seed=1)
    assert train.paths.count("z") == 1 and len(part) == 2 and len(train) == 2


def test_digits_are_the_1797_of_uci():
    train, val = open_images("digits", "train"), open_images("digits", "val")
    assert len(train) + len(val) == 1797 and train.num_classes == 10
    # Images per digit as scikit-learn documents them ("~180" each); these are load_digits' own
    # counts.
    assert (np.bincount(train.labels) + np.bincount(val.labels)).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda root: root / "nowhere", "does not exist"),
        (lambda root: root, "is empty"),
        (lambda root: (root / "a.jpg").write_text("x") and root, "no class folders"),
        (lambda root: (root / "ant").mkdir() or root, "has no images"),
    ],
)
def test_unusable_folder_is_one_clear_error(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        open_images(str(make(tmp_path)), "train")


@pytest.mark.parametrize(
    "content", [b"", b"this is text, not a picture", b"\xff\xd8\xff\xe0garbage"]
)
def test_undecodable_image_is_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UserError, match="bad.jpg"):
        read_image(str(tmp_path / "bad.jpg"))


def test_validation_images_lie_beside_the_training_ones(image_root):
    assert validation_path(str(image_root / "train")) == str(image_root / "val")
    assert validation_path(str(image_root)) == str(image_root)
    assert validation_path(os.path.dirname(__file__)) is None


def test_what_looks_like_an_image_and_is_left_out_is_counted_and_named(broken_copy):
    bee = broken_copy / "train" / "bee"
    (bee / "a.cr2").write_bytes(b"x")
    (bee / "b.CR2").write_bytes(b"x")
    (bee / "linked").symlink_to(broken_copy / "train" / "cat")
    (bee / "notes.txt").write_text("no picture")
    os.mkfifo(bee / "pipe.jpg")
    images = open_images(str(broken_copy / "train"), "train")
    assert len(images) == 48 and len(images.left_out) == 4
    line = left_out_message(images, "training")
    assert (
        "4 files or folders" in line
        and ".cr2" in line
        and ".jpg" in line
        and "linked folder" in line
    )
    assert (
        str(bee / "a.cr2") in line
        and left_out_message(open_images(str(broken_copy / "val"), "val"), "") is None
    )


def test_pictures_next_to_the_class_folders_are_named(broken_copy):
    shutil.copy(broken_copy / "train" / "ant" / "000.jpg", broken_copy / "train" / "lost.jpg")
    images = open_images(str(broken_copy / "train"), "train")
    assert [Path(path).name for path in images.left_out] == ["lost.jpg"]
    assert "1 files or folders that are not read (.jpg)" in left_out_message(images, "training")


def test_classes_without_validation_images_are_named(broken_copy):
    shutil.rmtree(broken_copy / "val" / "bee")
    known = open_images(str(broken_copy / "train"), "train").class_to_index
    images = open_images(str(broken_copy / "val"), "val", class_to_index=known)
    assert empty_classes_message(images, "validation") == (
        "warning: 1 of 3 classes have no validation images: bee"
    )


def test_an_image_with_two_labels_is_refused(tmp_path):
    for name in "ab":
        write_picture(tmp_path / "x" / f"{name}.png")
    (tmp_path / "train_list.txt").write_text("x/a.png 0\nx/b.png 1\nx/a.png 1\n")
    with pytest.raises(UserError, match="a.png with the labels 0 and 1"):
        open_images(str(tmp_path), "train")


def test_two_validation_folders_are_refused(tmp_path):
    for folder in ("train", "val", "valid"):
        write_picture(tmp_path / folder / "cat" / "a.png")
    with pytest.raises(UserError, match="has both 'val' and 'valid'"):
        open_images(str(tmp_path), "val")


@pytest.mark.parametrize("change", ["name", "size", "label", "class", "order"])
def test_a_fingerprint_tells_other_images_apart(broken_copy, tmp_path, change):
    train = broken_copy / "train"
    before = open_images(str(train), "train").fingerprint()
    shutil.copytree(broken_copy, tmp_path / "moved")
    assert open_images(str(tmp_path / "moved" / "train"), "train").fingerprint() == before
    if change == "name":
        (train / "ant" / "001.jpg").rename(train / "ant" / "0010.jpg")
    elif change == "size":
        shutil.copy(train / "ant" / "001.jpg", train / "ant" / "002.jpg")
    elif change == "label":
        (train / "ant" / "001.jpg").rename(train / "bee" / "0010.jpg")
    elif change == "class":
        (train / "ant").rename(train / "anteater")
    elif change == "order":
        (train / "ant").rename(train / "zebra")
    assert open_images(str(train), "train").fingerprint() != before


def test_a_missing_file_has_a_fingerprint_too(image_root, tmp_path):
    """With bad_samples=replace, training goes on without it."""
    shutil.copytree(image_root / "train", tmp_path / "train")
    images = open_images(str(tmp_path / "train"), "train")
    before = images.fingerprint()
    Path(images.paths[5]).unlink()
    assert images.fingerprint() != before


def test_gif_and_avif_are_read(tmp_path):
    (tmp_path / "a").mkdir()
    for suffix in ("gif", "avif"):
        Image.new("RGB", (8, 6), (200, 30, 30)).save(tmp_path / "a" / f"x.{suffix}")
    images = open_images(str(tmp_path), "train")
    assert len(images) == 2
    for index in range(2):
        assert (
            images.load(index).shape == (6, 8, 3)
            and abs(int(images.load(index)[2, 2, 0]) - 200) < 12
        )


def test_labels_that_contradict_the_class_folders_are_refused(broken_copy):
    (broken_copy / "val_list.txt").write_text(
        "val/ant/002.jpg 0\nval/bee/000.jpg 2\nval/cat/000.jpg 1\n"
    )
    with pytest.raises(
        UserError, match="2 of 3 labels contradict.*bee/000.jpg, labelled 2, while 'bee' is class 1"
    ):
        open_images(
            str(broken_copy / "val_list.txt"), "val", class_to_index={"ant": 0, "bee": 1, "cat": 2}
        )


def make_folders(root, *folders):
    """Each with an image."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(root / folder / "a.png")
    return root


@pytest.mark.parametrize(
    "train,val",
    [
        ("train", "val"),
        ("Train", "Valid"),
        ("training", "validation"),
        ("train", "test"),
        ("TRAIN", "TEST"),
        ("training", "testing"),
    ],
)
def test_parts_of_a_data_set_have_many_names(tmp_path, train, val):
    """Training on `training` against `test` as two classes gave no error."""
    make_folders(tmp_path, *(f"{part}/{name}" for part in (train, val) for name in ("cat", "dog")))
    for root in (tmp_path, tmp_path / train):
        config = make_config(data_path=str(root), val_split="auto")
        parts = open_all_parts(config)
        assert parts["train"].class_to_index == {"cat": 0, "dog": 1}
        assert all(f"/{train}/" in path for path in parts["train"].paths)
        assert all(f"/{val}/" in path for path in parts["val"].paths)


def test_a_validation_set_goes_before_a_test_set(tmp_path):
    make_folders(tmp_path, "train/cat", "test/cat", "val/cat")
    assert validation_path(str(tmp_path)) == str(tmp_path)
    (path,) = open_images(str(tmp_path), "val").paths
    assert "/val/" in path


def test_a_class_that_has_the_name_of_a_part_is_no_part(tmp_path):
    """Once, plane was silently dropped, and steam and electric became the classes."""
    make_folders(tmp_path, "plane", "train/steam", "train/electric")
    with pytest.raises(UserError, match="'plane' next to 'train'.*rename the class 'train'"):
        open_images(str(tmp_path), "train")
    # Whoever names the part itself is not asked, and a test set without classes is no class.
    make_folders(tmp_path / "root", "train/cat", "val/cat", "labels", "test")
    assert validation_path(f"{tmp_path}/root/train") == f"{tmp_path}/root/val"
    (tmp_path / "root" / "labels").rename(tmp_path / "labels")
    assert open_images(f"{tmp_path}/root", "train").class_to_index == {"cat": 0}
    # Without folders of its own it is a class like any other.
    other = make_folders(tmp_path / "other", "plane", "train", "test")
    assert open_images(str(other), "train").class_to_index == {"plane": 0, "test": 1, "train": 2}


def test_what_other_programs_leave_behind_is_no_image_and_no_class(tmp_path):
    make_folders(
        tmp_path, "cat", "dog", "__MACOSX", "@eaDir", "cat/@eaDir", ".cache", "dog/.hidden"
    )
    for place in (tmp_path / "cat", tmp_path / "dog"):
        (place / "._a.png").write_bytes(b"AppleDouble")
        (place / "Thumbs.db").write_bytes(b"x")
    images = open_images(str(tmp_path), "train")
    assert images.class_to_index == {"cat": 0, "dog": 1}
    assert [os.path.relpath(path, tmp_path) for path in images.paths] == ["cat/a.png", "dog/a.png"]
    message = left_out_message(images, "training")
    assert "7 files or folders" in message, message
    assert "(a hidden folder, left by another program)" in message, message
    # Only with pictures: .git is none of the user's business.
    shutil.rmtree(tmp_path / ".cache")
    (tmp_path / ".git").mkdir()
    assert "6 files or folders" in left_out_message(open_images(str(tmp_path), "train"), "")


def test_a_test_set_without_labels_is_no_class(tmp_path):
    """train/ with class folders, and pictures in test/: there is nothing to evaluate on."""
    make_folders(tmp_path / "train", "a", "b")
    make_folders(tmp_path, "test")
    with pytest.raises(UserError, match="nothing to evaluate on; pass --data_path=.*/train"):
        open_images(str(tmp_path), "val")


def test_a_list_with_a_byte_order_mark(tmp_path):
    make_folders(tmp_path, "cat")
    (tmp_path / "train_list.txt").write_text("cat/a.png 0\n", encoding="utf-8-sig")
    assert open_images(str(tmp_path), "train").paths == [str(tmp_path / "cat" / "a.png")]


def test_a_label_without_images_keeps_its_number_apart_from_folders(tmp_path):
    lines = []
    for folder, label in (("1", 0), ("2", 1), ("4", 3)):
        write_picture(tmp_path / folder / "a.png")
        lines.append(f"{folder}/a.png {label}")
    (tmp_path / "train_list.txt").write_text("\n".join(lines))
    assert open_images(str(tmp_path), "train").class_to_index == {
        "1": 0,
        "2": 1,
        "2 (no images)": 2,
        "4": 3,
    }


def test_labels_that_begin_at_1_are_refused(tmp_path):
    """They gave a class 0 without an image."""
    make_folders(tmp_path, "cat", "dog")
    (tmp_path / "train_list.txt").write_text("cat/a.png 1\ndog/a.png 2\n")
    with pytest.raises(UserError, match="begin at 1; they must begin at 0"):
        open_images(str(tmp_path), "train")


def write_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.extended)])
def test_drawn_layouts_are_as_image_folder_sees_them_or_refused(tmp_path, count):
    random, outcomes = np.random.default_rng(0), {True: 0, False: 0}
    for number in range(count):
        root = tmp_path / str(number)
        outcomes[check_layout(root, draw_layout(random, root))] += 1
        shutil.rmtree(root)
    assert min(outcomes.values()) > count / 5


def test_folders_in_a_class_folder_may_have_been_meant_as_classes(tmp_path):
    """As torchvision's ImageFolder they are one class; unlike there, somebody is told."""

    def images(*folders):
        # A folder above has the name of a class.
        root = tmp_path / str(len(list(tmp_path.iterdir()))) / "cat"
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / "1.png").touch()
        return open_images(str(root), "train")

    mixed = images("animals/cat", "animals/dog", "truck")
    assert sorted(mixed.class_to_index) == ["animals", "truck"]
    assert nested_classes_message(mixed, "training") == (
        "warning: the class folder 'animals' has no training images of its own: those in its 2 "
        "folders (cat, dog) count as one class"
    )
    # Tiny ImageNet's layout, and photographs that are sorted further.
    assert nested_classes_message(images("cat/images", "dog/images"), "training") is None
    assert nested_classes_message(images("cat", "cat/2024", "cat/2025", "dog"), "training") is None


def test_cifar_follows_the_classes_of_training(tmp_path):
    """The file's labels are its own order of classes."""
    for number in range(1, 6):
        record = np.append(number, np.zeros(3 * 32 * 32)).astype(np.uint8)
        record.tofile(tmp_path / f"data_batch_{number}.bin")
    names = [*CIFAR10.classes]
    reverse = {name: label for label, name in enumerate(reversed(names))}
    images = open_images(str(tmp_path), "train", class_to_index=reverse)
    assert images.labels.tolist() == [8, 7, 6, 5, 4] and images.class_to_index == reverse
    with pytest.raises(UserError, match="none of the 3 training classes"):
        open_images(str(tmp_path), "train", class_to_index={"ant": 0, "bee": 1, "cat": 2})
    # Numbers name no classes.
    numbered = {str(label): label for label in range(10)}
    images = open_images(str(tmp_path), "train", class_to_index=numbered)
    assert images.labels.tolist() == [1, 2, 3, 4, 5]
    assert "'airplane' is taken for '0', and so on in order" in images.notes[0]
    with pytest.raises(UserError, match="none of the 3 training classes"):
        open_images(str(tmp_path), "train", class_to_index={"0": 0, "1": 1, "2": 2})


def test_accents_may_be_written_in_two_forms_of_unicode(broken_copy):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    (broken_copy / "train" / "bee").rename(broken_copy / "train" / composed)
    (broken_copy / "val" / "bee").rename(broken_copy / "val" / decomposed)
    train = open_images(str(broken_copy), "train")
    validation = open_images(str(broken_copy), "val", class_to_index=train.class_to_index)
    assert validation.class_to_index == train.class_to_index and len(validation) == 67
    (broken_copy / "train" / "cat").rename(broken_copy / "train" / decomposed)
    with pytest.raises(UserError, match="two forms of Unicode"):
        open_images(str(broken_copy), "train")


@pytest.mark.parametrize(
    "change,kind",
    [
        (lambda file: file.rename(file.with_suffix("")), "no ending"),
        (lambda file: file.rename(file.with_suffix(".jpg_large")), ".jpg_large"),
        (lambda file: file.rename(file.with_suffix(".dat")), ".dat"),
        (lambda file: (file.unlink(), file.symlink_to("nowhere.jpg")), "a broken link"),
    ],
)
def test_a_file_that_is_not_read_is_named(broken_copy, change, kind):
    change(broken_copy / "train" / "bee" / "003.jpg")
    (broken_copy / "train" / "bee" / "labels.txt").write_text("of no interest")
    images = open_images(str(broken_copy / "train"), "train")
    message = left_out_message(images, "training")
    assert len(images) == 47 and "1 files or folders" in message and f"({kind})" in message


def test_lists_that_repeat_images_or_have_other_folders_are_spoken_of(image_root, tmp_path):
    known = {"ant": 0, "bee": 1, "cat": 2}
    for place, name in enumerate(("dog", "fox", "owl")):
        shutil.copytree(image_root / "val" / known_name(known, place), tmp_path / name)
    lines = [f"{name}/005.jpg {label}" for label, name in enumerate(("dog", "fox", "owl"))]
    (tmp_path / "list.txt").write_text("\n".join([*lines, lines[0], lines[0]]))
    images = open_images(str(tmp_path / "list.txt"), "val", class_to_index=known)
    repeated, folders = set_messages(images, "validation")
    assert "2 of 5 lines" in repeated and "folder 'dog' as 0, which is 'ant'" in folders
    # One folder for all classes says nothing of them.
    (tmp_path / "list.txt").write_text("dog/005.jpg 0\ndog/006.jpg 1\n")
    assert not open_images(str(tmp_path / "list.txt"), "val", class_to_index=known).notes


def known_name(classes, label):
    return next(name for name, known in classes.items() if known == label)


def test_a_label_that_is_no_number_of_a_class_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "train_list.txt").write_text("a.jpg 0\nb.jpg 99999\n")
    with pytest.raises(UserError, match="label 99999 but only 2 different"):
        open_images(str(tmp_path), "train")
    # A few images of a network with very many classes.
    many = {f"c{label}": label for label in range(100_000)}
    assert len(open_images(str(tmp_path), "train", class_to_index=many)) == 2


def test_pictures_that_a_list_does_not_name_are_counted(image_root, tmp_path):
    """An old list next to the folder of the training images replaced them silently."""
    shutil.copytree(image_root / "train", tmp_path / "train")
    lines = [f"train/{name}/{i:03}.jpg {label}" for i in range(5) for label, name in LABELLED]
    (tmp_path / "train_list.txt").write_text("\n".join(lines))
    (note,) = open_images(str(tmp_path), "train").notes
    assert note == (
        f"{tmp_path}/train_list.txt is used, which lists 15 images; {tmp_path}/train has 48, which "
        f"--data_path={tmp_path}/train takes"
    )
    assert len(open_images(str(tmp_path / "train"), "train")) == 48
    # Whoever names the list means it.
    assert open_images(str(tmp_path / "train_list.txt"), "train").notes == ()
    every = [f"train/{name}/{i:03}.jpg {label}" for i in range(16) for label, name in LABELLED]
    (tmp_path / "train_list.txt").write_text("\n".join(every))
    shutil.copy(tmp_path / "train/ant/000.jpg", tmp_path / "train/ant/._000.jpg")
    assert open_images(str(tmp_path), "train").notes == ()


def test_a_list_of_a_flat_folder_is_read(image_root, tmp_path):
    (tmp_path / "train").mkdir()
    for label, name in LABELLED:
        shutil.copy(image_root / f"train/{name}/000.jpg", tmp_path / f"train/{label}.jpg")
    lines = "\n".join(f"train/{label}.jpg {label}" for label, _ in LABELLED)
    (tmp_path / "train_list.txt").write_text(lines)
    images = open_images(str(tmp_path), "train")
    assert images.labels.tolist() == [0, 1, 2] and images.notes == ()
