"""Data sets with one folder of images per class."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from src.dataset.image_set import ImageSet
from src.utils.errors import UserError

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".bmp",
    ".webp",
    ".ppm",
    ".tif",
    ".tiff",
    ".gif",
    ".avif",
)
# Pictures of formats that are not read.
_OTHER_PICTURES = (
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".svg",
    ".psd",
    ".tga",
    ".ico",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".raw",
    ".eps",
    ".pdf",
)


def open_class_folders(
    path: Path, split: str, class_to_index: Mapping[str, int] | None
) -> ImageSet:
    """The images of the class folders in ``path``, or in ``path``/``split`` if that has any."""
    inner = path / split
    root = inner if inner.is_dir() and _has_folders(inner) else path
    folders = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders:
        what = "is empty: it has no class folders"
        if list_images(root)[0]:
            what = "has images but no class folders"
        raise UserError(f"data_path '{root}' {what}; it must hold one folder of images per class")
    known = class_to_index or {name: label for label, name in enumerate(folders)}
    unknown = [name for name in folders if name not in known]
    if unknown:
        raise UserError(
            f"class folder '{unknown[0]}' in {root} is none of the {len(known)} training classes"
        )
    paths: list[str] = []
    labels: list[int] = []
    left_out: list[str] = []
    for name in folders:
        images, others = list_images(root / name)
        left_out += others
        if not images:
            raise UserError(_no_images(root / name, others))
        paths += images
        labels += [known[name]] * len(images)
    return ImageSet(dict(known), np.array(labels, np.int32), paths, left_out=tuple(left_out))


def list_images(folder: Path | str) -> tuple[list[str], list[str]]:
    """(image files in ``folder`` and below, sorted; pictures there that are left out)."""
    images: list[str] = []
    left_out: list[str] = []
    folders: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name.lower()
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif name.endswith(EXTENSIONS) and entry.is_file():
            images.append(entry.path)
        elif name.endswith((*EXTENSIONS, *_OTHER_PICTURES)) or entry.is_dir():
            left_out.append(entry.path)
    for inner in folders:
        more, also_left_out = list_images(inner)
        images += more
        left_out += also_left_out
    return images, left_out


def _has_folders(path: Path) -> bool:
    return any(entry.is_dir() for entry in os.scandir(path))


def _no_images(folder: Path, others: list[str]) -> str:
    also = ""
    if others:
        also = f"; it has {len(others)} files of formats that are not read, such as {others[0]}"
    formats = ", ".join(EXTENSIONS[:3])
    return (
        f"class folder '{folder}' has no images ({formats} ...){also}; add some or remove the "
        "folder"
    )
