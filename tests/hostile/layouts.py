"""Folders of images as people have them, drawn at random: torchvision's classes, or refused."""

import shutil

from conftest import make_config
from PIL import Image

from src.dataset.splits import open_all_parts
from src.utils.errors import UserError


def draw_layout(random, root):
    """Make a tree as people have them. Returns {part: {class: images}}, or None if it is odd.

    The parts are those that torchvision.datasets.ImageFolder would be given, and the counts those
    that it finds in them: all image files below each class folder.
    """
    classes = sorted(random.choice(["cat", "Dog", "n0144", "7", "12", "é", "a b"], 3, False))
    has_parts = random.random() < 0.8
    names = {"train": ["train", "Train", "TRAINING"], "val": ["val", "Valid", "validation", "test"]}
    parts = {part: random.choice(names[part]) for part in names} if has_parts else {"train": "."}
    oddity = random.choice(
        ["", "", "", "shallow", "deep", "extra class", "empty class", "tiny imagenet", "kaggle"]
    )
    counts = {}
    for part, folder in parts.items():
        counts[part] = dict.fromkeys(classes, 0)
        for name in classes:
            inner = random.choice(["", "images", "2019/may"])
            for number in range(random.integers(1, 4)):
                suffix = random.choice([".png", ".PNG", ".png", ".jpeg"])
                write_picture(root / folder / name / inner / f"{number}{suffix}")
                counts[part][name] += 1
            litter = random.choice(["", ".DS_Store", "._0.png", "notes.txt", "@eaDir/0.png"])
            if litter:
                write_picture(root / folder / name / litter)
    last = root / list(parts.values())[-1]
    if oddity == "shallow":
        for name in classes:
            shutil.rmtree(last / name)
        write_picture(last / "0.png")
        if last.name == "test":  # of pictures without labels, as competitions have it
            del counts["val"]
            return counts
    elif oddity == "deep" and has_parts:
        (root / "set").mkdir()
        for folder in parts.values():
            (root / folder).rename(root / "set" / folder)
    elif oddity == "extra class" and has_parts:
        write_picture(last / "unknown" / "0.png")
    elif oddity == "tiny imagenet" and has_parts:
        # Its validation images lie in one folder, and a table has their classes.
        lines = []
        for name in classes:
            shutil.rmtree(last / name)
            write_picture(last / "images" / f"val_{name}.JPEG")
            lines.append(f"val_{name}.JPEG\t{name}\t0\t0\t62\t62\n")
        (last / "val_annotations.txt").write_text("".join(lines))
    elif oddity == "kaggle":
        # The class is a part of the name.
        for name in classes:
            shutil.rmtree(last / name)
            write_picture(last / f"{name}.0.jpg")
            write_picture(last / f"{name}.1.jpg")
        if last.name == "test":
            del counts["val"]
            return counts
    elif oddity == "empty class":
        (last / "zebra").mkdir()
    is_odd = oddity in ("shallow", "kaggle", "empty class") or (oddity and has_parts)
    return None if is_odd else counts


def check_layout(root, counts):
    """Whether the images below ``root`` are taken.

    AssertionError if classes and counts are not ``counts``, or if an odd tree is taken.
    """
    try:
        parts = open_all_parts(make_config(data_path=str(root)))
    except UserError as refusal:
        assert counts is None, refusal
        return False
    found = {
        part: {
            name: int((images.labels == label).sum())
            for name, label in images.class_to_index.items()
        }
        for part, images in parts.items()
    }
    assert found == counts
    assert [list(part) for part in found.values()] == [sorted(found["train"])] * len(found)
    return True


def write_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")
