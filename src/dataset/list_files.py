"""Data sets described by a list file with lines of "PATH LABEL"."""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from src.dataset.class_folders import EXTENSIONS, is_litter
from src.dataset.image_set import ImageSet, composed
from src.dataset.packed import ENDING as PACKED
from src.utils.errors import UserError

_MAX_LABEL = 10**6
_SHOWN_CHARACTERS = 80
# Larger folders next to a list are not counted.
_MOST_COUNTED = 100_000
# From this label on, there must be a twentieth as many different ones.
_LARGE_LABEL, _LABELS_PER_CLASS = 1000, 20


def is_list(path: Path, split: str) -> bool:
    """Whether ``path`` is a list file, or a folder with ``split``_list.txt."""
    return path.is_file() or (path / f"{split}_list.txt").is_file()


def open_list(path: Path, split: str, class_to_index: Mapping[str, int] | None) -> ImageSet:
    """The images of a list file, or of ``split``_list.txt in the folder ``path``."""
    list_file = path if path.is_file() else path / f"{split}_list.txt"
    root = list_file.parent.resolve()
    # The name of a list tells which part it is of, whatever the command wants it for.
    named = [part for part in ("train", "val") if list_file.name == f"{part}_list.txt"]
    part = named[0] if named else split
    try:
        # Some editors begin UTF-8 with a byte-order mark.
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        reason = getattr(failure, "strerror", None) or _what_instead(path)
        raise UserError(f"cannot read the list {list_file}: {reason}") from None
    paths: list[str] = []
    listed: list[int] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            image, label = _parse_line(line, f"{list_file} line {number}", root, part)
            paths.append(image)
            listed.append(label)
    if not paths:
        raise UserError(f"the list {list_file} names no image; it needs lines of 'PATH LABEL'")
    if not os.path.isfile(paths[0]):
        raise UserError(f"{list_file} names {paths[0]}, which does not exist")
    _check_repetitions(list_file, paths, listed)
    labels = np.array(listed, np.int32)
    if class_to_index is None:
        _check_gaps(list_file, labels)
    if class_to_index is None and labels.min() == 1:
        raise UserError(
            f"the labels in {list_file} begin at 1; they must begin at 0, or class 0 would have no "
            "image"
        )
    known = class_to_index or _class_names(paths, labels)
    if class_to_index is not None:
        _check_labels(list_file, paths, listed, known)
    outside = labels[labels > max(known.values())]
    if outside.size:
        raise UserError(
            f"{list_file} has label {outside[0]}, outside the {len(known)} training classes"
        )
    notes = [*_unlisted_note(path, list_file, paths, split), *_repetition_note(list_file, paths)]
    notes += [*_folder_note(list_file, paths, labels, known)]
    if labels.min() == 1:
        notes.append(f"{list_file} has no label 0; if its labels begin at 1, subtract 1 from each")
    return ImageSet(dict(known), labels, paths, notes=tuple(notes), is_list=True)


def _unlisted_note(path: Path, list_file: Path, paths: Sequence[str], split: str) -> list[str]:
    """A note if the list in a root names fewer images than its folder of that part has."""
    folder = path / split
    if list_file.parent != path or not folder.is_dir():
        return []
    count = 0
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_litter(name)]
        pictures = (name for name in names if name.lower().endswith(EXTENSIONS))
        count += sum(not is_litter(name) for name in pictures)
        if count > _MOST_COUNTED:
            return []
    if count <= len(paths):
        return []
    return [
        f"{list_file} is used, which lists {len(paths)} images; {folder} has {count}, which "
        f"--data_path={folder} takes"
    ]


def _check_gaps(list_file: Path, labels: np.ndarray) -> None:
    """Raise UserError for numbers that are probably not labels: few, and very large."""
    different, largest = len(np.unique(labels)), int(labels.max())
    if largest >= _LARGE_LABEL and largest >= _LABELS_PER_CLASS * different:
        raise UserError(
            f"{list_file} has label {largest} but only {different} different labels; labels must "
            "number the classes: 0, 1, 2 and so on"
        )


def _repetition_note(list_file: Path, paths: Sequence[str]) -> list[str]:
    repeated = len(paths) - len(set(paths))
    if not repeated:
        return []
    return [f"{repeated} of {len(paths)} lines in {list_file} repeat an image; every line counts"]


def _folder_note(
    list_file: Path, paths: Sequence[str], labels: np.ndarray, known: Mapping[str, int]
) -> list[str]:
    """A note if each label has a folder of its own that is not called like its class."""
    folders, names = composed(_class_names(paths, labels)), composed(known)
    unknown = [name for name in folders if name not in names]
    are_numbers = any(name == str(label) for name, label in (*folders.items(), *known.items()))
    if len(np.unique(labels)) < 2 or not unknown or are_numbers:
        return []
    name = unknown[0]
    expected = next(other for other, label in known.items() if label == folders[name])
    return [
        f"{list_file} labels images of the folder '{name}' as {folders[name]}, which is "
        f"'{expected}' in training; the labels in the list are used"
    ]


def _check_repetitions(list_file: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
    """Raise UserError for an image that is listed with two labels."""
    first: dict[str, int] = {}
    for path, label in zip(paths, labels):
        if first.setdefault(path, label) != label:
            raise UserError(f"{list_file} lists {path} with the labels {first[path]} and {label}")


def _check_labels(
    list_file: Path, paths: Sequence[str], labels: Sequence[int], known: Mapping[str, int]
) -> None:
    """Raise UserError for labels that contradict the class folders in their paths."""
    known = composed(known)
    contradictions = [
        (path, label)
        for path, label in zip(paths, labels)
        if known.get(_folder_name(path), label) != label
    ]
    if contradictions:
        image, label = contradictions[0]
        name = _folder_name(image)
        raise UserError(
            f"{list_file}: {len(contradictions)} of {len(paths)} labels contradict the class "
            f"folders in their paths; the first is {image}, labelled {label}, while '{name}' is "
            f"class {known[name]} in training"
        )


def _folder_name(path: str) -> str:
    return unicodedata.normalize("NFC", os.path.basename(os.path.dirname(path)))


def _what_instead(path: Path) -> str:
    if path.suffix.lower() in EXTENSIONS:
        return "it is an image; name a folder of images"
    if path.stem.lower().endswith(PACKED):
        return f"it is a part of a packed set; name its first file, {path.stem}"
    return "it is not text"


def _parse_line(line: str, where: str, root: Path, split: str) -> tuple[str, int]:
    path, _, label = line.strip().rpartition(" ")
    path = path.strip()
    is_label = label.isascii() and label.isdigit() and int(label) <= _MAX_LABEL
    if not path or not is_label:
        shown = line.strip()[:_SHOWN_CHARACTERS]
        raise UserError(f"{where}: '{shown}' is not 'PATH LABEL' with a label from 0")
    full = os.path.normpath(os.path.join(root, path))
    if "\0" in path or not full.startswith(str(root) + os.sep):
        raise UserError(f"{where}: '{path[:_SHOWN_CHARACTERS]}' is outside the list's folder")
    # Lists are written both ways: relative to the tree, and relative to its train/ or val/ folder.
    in_split = os.path.join(root, split, path)
    if not os.path.exists(full) and os.path.exists(in_split):
        return in_split, int(label)
    return full, int(label)


def _class_names(paths: Sequence[str], labels: np.ndarray) -> dict[str, int]:
    """{class name: label}: the folder of each label's images if unambiguous, else the number."""
    folders: dict[int, set[str]] = {}
    for path, label in zip(paths, labels.tolist()):
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(path)))
    names = {label: next(iter(found)) for label, found in folders.items()}
    one_folder_each = all(len(found) == 1 for found in folders.values())
    if one_folder_each and len(set(names.values())) == len(names):
        for label in range(max(names) + 1):
            if label not in names:
                # A folder may be called after a number too.
                is_taken = str(label) in names.values()
                names[label] = f"{label} (no images)" if is_taken else str(label)
        return {names[label]: label for label in sorted(names)}
    return {str(label): label for label in range(max(names) + 1)}
