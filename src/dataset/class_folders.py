"""Data sets with one folder of images per class."""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from src.dataset.decoding import HEIF_ENDINGS, reads_heif
from src.dataset.image_set import ImageSet, find_class
from src.utils.errors import UserError

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".pjpeg",
    ".pjp",
    ".mpo",
    ".png",
    ".apng",
    ".bmp",
    ".dib",
    ".webp",
    ".pnm",
    ".pbm",
    ".pgm",
    ".ppm",
    ".tif",
    ".tiff",
    ".gif",
    ".avif",
    ".avifs",
    *(HEIF_ENDINGS if reads_heif() else ()),
)
# Names of the parts of a data set, in lower case. A test set validates if there is no other.
SPLITS = {
    "train": (("train", "training"),),
    "val": (("val", "valid", "validation", "dev", "eval"), ("test", "testing")),
}
# What operating systems, editors and file servers leave in folders, besides hidden files.
_LITTER = (
    "__macosx",
    "@eadir",
    "@recycle",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "found.000",
    "lost+found",
    "network trash folder",
    "temporary items",
    "thevolumesettingsfolder",
    "~snapshot",
    "@recently-snapshot",
    "@transcode",
    "@sharebin",
    "@__thumb",
    "_gsdata_",
    "__pycache__",
)
# What people keep next to pictures. Any other file may be meant as a picture, so it is reported.
_TEXTS = (
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".rst", ".html", ".htm", ".yaml",
    ".yml", ".toml", ".log", ".ini", ".cfg", ".db", ".py", ".sh",
)  # fmt: skip
_KINDS_NAMED = 5


def open_class_folders(
    path: Path, split: str, class_to_index: Mapping[str, int] | None
) -> ImageSet:
    """The images of the class folders in ``path``, or in its part ``split`` if it has parts."""
    part = find_split(path, split)
    train = find_part(path, "train") if part is None and split == "val" else None
    if train is not None:
        raise UserError(
            f"'{path}' holds training images and no others in class folders, so there is nothing "
            f"to evaluate on; pass --data_path={train} to evaluate on those"
        )
    root = part or path
    entries = _folders(root)
    folders = [name for name in entries if not is_litter(name)]
    litter = [str(root / name) for name in entries if is_litter(name) and _is_told(root / name)]
    if not folders:
        what = "is empty: it has no class folders"
        if list_images(root)[0]:
            what = "has images but no class folders"
        raise UserError(f"data_path '{root}' {what}; it must hold one folder of images per class")
    _check_depth(root, folders)
    _check_spellings(root, folders)
    known = class_to_index or {name: label for label, name in enumerate(folders)}
    paths: list[str] = []
    labels: list[int] = []
    left_out = litter + _loose_pictures(root)
    for name in folders:
        images, others = list_images(root / name)
        left_out += others
        if not images:
            raise UserError(_no_images(root / name, others))
        paths += images
        labels += [find_class(name, known, f"the class folders of {root}")] * len(images)
    return ImageSet(dict(known), np.array(labels, np.int32), paths, left_out=tuple(left_out))


def _check_spellings(root: Path, folders: list[str]) -> None:
    """Raise UserError for two folders of one name, whose accents are written in two forms."""
    first: dict[str, str] = {}
    for name in folders:
        if first.setdefault(unicodedata.normalize("NFC", name), name) != name:
            raise UserError(
                f"{root} has two folders '{name}': their names look the same, but the accents are "
                "written in two forms of Unicode; move the images into one of them"
            )


def _check_depth(root: Path, folders: list[str]) -> None:
    """Raise UserError if the class folders are probably one level further down."""
    for name in folders:
        part = find_part(root / name, "train") or find_part(root / name, "val")
        if part is not None:
            raise UserError(
                f"'{root / name}' holds the part '{part.name}' of a data set, so it is not a class "
                f"folder: pass --data_path={root / name}"
            )
    inner = [name for name in _folders(root / folders[0]) if not is_litter(name)]
    if len(folders) == 1 and len(inner) > 1 and not _has_pictures(root / folders[0]):
        raise UserError(
            f"'{root}' has the single class folder '{folders[0]}', which has folders and no "
            f"images: if these are the classes, pass --data_path={root / folders[0]}"
        )


def _has_pictures(folder: Path) -> bool:
    return any(name.lower().endswith(EXTENSIONS) for name in os.listdir(folder))


def _loose_pictures(root: Path) -> list[str]:
    """Pictures next to the class folders, which belong to no class."""
    files = (entry for entry in os.scandir(root) if not entry.is_dir())
    return sorted(
        entry.path
        for entry in files
        if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
    )


def find_split(path: Path, split: str) -> Path | None:
    """``find_part``, after checking that ``path`` is clearly a folder of parts.

    Raises:
        UserError: if it has other folders too, so that the part may be one class among others.
    """
    part = find_part(path, split)
    others = [name for name in _folders(path) if not is_litter(name) and not _is_split(name)]
    if part is not None and others:
        raise UserError(
            f"'{path}' has the folder '{others[0]}' next to '{part.name}': if '{part.name}' is a "
            f"part of the data set, pass --data_path={part}, else rename the class '{part.name}'"
        )
    return part


def find_part(path: Path, split: str) -> Path | None:
    """The folder of part ``split`` in ``path``: a name in SPLITS (in any case), with subfolders.

    Raises:
        UserError: if a folder of that name has images only. A test set without class folders is
            skipped instead: it has no labels.
    """
    folders = _folders(path)
    found = [path / name for names in SPLITS[split] for name in folders if name.lower() in names]
    only_parts = all(_is_split(name) or is_litter(name) for name in folders)
    with_classes = [folder for folder in found if _folders(folder)]
    for folder in with_classes[1:]:
        names = (folder.name.lower(), with_classes[0].name.lower())
        if only_parts and all(name in SPLITS[split][0] for name in names):
            raise UserError(
                f"'{path}' has both '{with_classes[0].name}' and '{folder.name}'; pass the one "
                "that is meant with --data_path or --eval_data_path"
            )
    for folder in found:
        if folder in with_classes:
            return folder
        if only_parts and folder.name.lower() in SPLITS[split][0] and _has_pictures(folder):
            raise UserError(
                f"'{folder}' has images but no class folders, so their labels are unknown; move it "
                "away, or put its images into one folder per class"
            )
    return None


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or is left there by another program."""
    return name.startswith((".", "~$")) or name.lower() in _LITTER


def _is_told(folder: Path) -> bool:
    """Whether to report litter: hidden folders only if they contain images."""
    return folder.name.lower() in _LITTER or (folder.is_dir() and _has_pictures(folder))


def list_images(folder: Path | str) -> tuple[list[str], list[str]]:
    """(image files in ``folder`` and below, sorted; other files there, except text files)."""
    images: list[str] = []
    left_out: list[str] = []
    folders: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name.lower()
        if is_litter(name):
            if name.endswith(EXTENSIONS) or _is_told(Path(entry.path)):
                left_out.append(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif name.endswith(EXTENSIONS) and entry.is_file():
            images.append(entry.path)
        elif not name.endswith(_TEXTS) or entry.is_dir():
            left_out.append(entry.path)
    for inner in folders:
        more, also_left_out = list_images(inner)
        images += more
        left_out += also_left_out
    return images, left_out


def unread(paths: Sequence[str]) -> str:
    """Describes skipped files and folders: how many, of which kinds, and one example."""
    kinds = sorted({_kind(path) for path in paths})
    named = [*kinds[:_KINDS_NAMED], *(["..."] * (len(kinds) > _KINDS_NAMED))]
    heif = [kind for kind in kinds if kind in HEIF_ENDINGS]
    hint = f"; 'bash scripts/setup.sh --heif' makes {heif[0]} readable" if heif else ""
    return (
        f"{len(paths)} files or folders that are not read ({', '.join(named)}), such as {paths[0]}"
        f"{hint}"
    )


def _kind(path: str) -> str:
    """A word for a file or folder that is left out."""
    if is_litter(os.path.basename(path)):
        return "a hidden folder" if _is_hidden_folder(path) else "left by another program"
    if os.path.islink(path) and not os.path.exists(path):
        return "a broken link"
    if os.path.isdir(path):
        return "a linked folder"
    return os.path.splitext(path)[1].lower() or "no ending"


def _is_hidden_folder(path: str) -> bool:
    return os.path.basename(path).startswith(".") and os.path.isdir(path)


def _is_split(name: str) -> bool:
    return any(name.lower() in names for groups in SPLITS.values() for names in groups)


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def _no_images(folder: Path, others: list[str]) -> str:
    also = ""
    if others:
        also = f"; it has {unread(others)}"
    formats = ", ".join(EXTENSIONS[:3])
    return (
        f"class folder '{folder}' has no images ({formats} ...){also}; add some or remove the "
        "folder"
    )
