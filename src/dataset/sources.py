"""Where labelled images come from: class folders, list files, CIFAR, packed sets, the bundled digits."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.dataset.cifar import CIFAR10, CIFAR100, Cifar
from src.dataset.decoding import BadImage, open_regular, read_image
from src.dataset.image_set import ImageSet
from src.dataset.packed import ENDING as PACKED
from src.dataset.packed import PackedImages, is_packed
from src.utils.config import Config
from src.utils.errors import UserError, suggestion

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif", ".avif")
# Pictures all the same, which are not read.
_OTHER_PICTURES = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ico", ".dng", ".cr2", ".nef", ".arw", ".raw", ".eps", ".pdf")
DIGITS_FOLDER = Path(__file__).resolve().parents[2] / "data" / "digits"
_LISTED_BAD_LINE = 80
_SEARCHED_FILES = 100_000
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"
# JPEG, PNG, BMP, WebP, TIFF (both byte orders), and the netpbm formats
_MAGIC = (_JPEG, _PNG, b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
# What the last bytes of a whole file hold; cameras may add some bytes behind.
_ENDS = {_JPEG: b"\xff\xd9", _PNG: b"IEND"}
_LAST_BYTES = 64
_SPLIT_SHARE = 0.2
Classes = Mapping[str, int] | None


def find_bad_image(images: ImageSet, rank: int, size: int) -> list[str]:
    """A message on the first bad file of a rank's share of ``images`` as a list, empty if a quick look finds none.

    Looks at the first and last bytes of each file, and decodes those that look cut off. That takes minutes for very many
    files, so larger sets are not searched: scripts/check_dataset.py does.
    """
    if images.paths is None or len(images) > _SEARCHED_FILES:
        return []
    for path in images.paths[rank::size]:
        if not _looks_whole(path):
            try:
                read_image(path)
            except BadImage as failure:
                return [str(failure)]
    return []


@dataclass(frozen=True)
class DataSource:
    """One form in which data sets come.

    Attributes:
        recognise: (path, split) -> whether ``path``, which exists, holds such a data set.
        open: (path, split, class_to_index) -> its ImageSet; see ``open_images``.
    """

    recognise: Callable[[Path, str], bool]
    open: Callable[[Path, str, Classes], ImageSet]


def open_images(data_path: str, split: str, dataset_format: str = "auto", class_to_index: Classes = None) -> ImageSet:
    """Open the images that ``data_path`` names.

    Args:
        data_path: "digits"; a folder with one folder per class; a root with train/ and val/, or with train_list.txt and
            val_list.txt; a list file with "PATH LABEL" lines; a packed set; a folder of CIFAR-10's or CIFAR-100's files.
        split: "train" or "val": which part of a root, of CIFAR or of the digits.
        dataset_format: a name in SOURCES, or "auto" for the first that recognises the path.
        class_to_index: the training's map; labels follow it, so that a missing class shifts nothing.

    Raises:
        UserError: if there is no such data, a class is empty or unknown, or a list has a bad line.
    """
    if not data_path:
        raise UserError("this recipe needs data: pass --data_path=DIR (a folder with one folder of images per class)")
    check_source(dataset_format)
    path = DIGITS_FOLDER if data_path == "digits" else Path(data_path)
    if not path.exists():
        raise UserError(f"data_path '{data_path}' does not exist; pass --data_path=DIR, or link your data to that name")
    if dataset_format != "auto" and (path.is_dir() or dataset_format in _OF_FILES):
        return SOURCES[dataset_format].open(path, split, class_to_index)
    return next(source for source in SOURCES.values() if source.recognise(path, split)).open(path, split, class_to_index)


def check_source(dataset_format: str) -> None:
    """Raise UserError for a dataset_format that does not exist."""
    if dataset_format not in ("auto", *SOURCES):
        raise UserError(f"unknown dataset_format={dataset_format}{suggestion(dataset_format, SOURCES)}; "
                        f"there are auto, {', '.join(SOURCES)}")


def validation_path(data_path: str) -> str | None:
    """Where the validation images of a training ``data_path`` are by custom, or None.

    A root holds both parts; beside ``.../train`` lies ``.../val`` or ``.../val_list.txt``.
    """
    path = Path(data_path)
    holds_cifar = any(cifar.find(path) for cifar in (CIFAR10, CIFAR100))
    if data_path == "digits" or holds_cifar or (path / "val").is_dir() or (path / "val_list.txt").is_file():
        return data_path
    for sibling in ("val", "val_list.txt", f"val{PACKED}", "validation", "test"):
        if path.name in ("train", "train_list.txt", f"train{PACKED}") and (path.parent / sibling).exists():
            return str(path.parent / sibling)
    return None


def split_share(config: Config) -> float:
    """Share of the training images that is for validation: val_split, with "auto" 0.2 if there are no other validation images."""
    if config.val_split != "auto":
        return config.val_split
    return 0.0 if config.eval_data_path or validation_path(config.data_path) else _SPLIT_SHARE


def _looks_whole(path: str) -> bool:
    try:
        with open_regular(path) as file:
            first = file.read(4)
            file.seek(max(os.fstat(file.fileno()).st_size - _LAST_BYTES, 0))
            return looks_whole(first, file.read(_LAST_BYTES))
    except OSError:
        return False


def looks_whole(first: bytes, last: bytes) -> bool:
    """Whether an image file that begins and ends so, 4 and 64 bytes, is likely to be complete."""
    end = next((end for magic, end in _ENDS.items() if first.startswith(magic)), b"")
    return first.startswith(_MAGIC) and end in last


def _holds_class_folders(path: Path) -> bool:
    return any(entry.is_dir() for entry in os.scandir(path))


def _from_folder(path: Path, split: str, class_to_index: Classes) -> ImageSet:
    inner = path / split
    root = inner if inner.is_dir() and _holds_class_folders(inner) else path
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        what = "has images but no class folders" if images_in(root)[0] else "is empty: it has no class folders"
        raise UserError(f"data_path '{root}' {what}; it must hold one folder of images per class")
    known = class_to_index or {name: label for label, name in enumerate(folders)}
    unknown = [name for name in folders if name not in known]
    if unknown:
        raise UserError(f"class folder '{unknown[0]}' in {root} is none of the {len(known)} classes of the training")
    paths: list[str] = []
    labels: list[int] = []
    left_out: list[str] = []
    for name in folders:
        images, others = images_in(root / name)
        left_out += others
        if not images:
            also = f"; {len(others)} files there are of kinds that are not read, the first is {others[0]}" if others else ""
            raise UserError(f"class folder '{root / name}' has no images ({', '.join(EXTENSIONS[:3])} ...){also}; "
                            "add some or remove the folder")
        paths += images
        labels += [known[name]] * len(images)
    return ImageSet(dict(known), np.array(labels, np.int32), paths, left_out=tuple(left_out))


def images_in(folder: Path | str) -> tuple[list[str], list[str]]:
    """(image files in ``folder`` and below, in order; what looks like images there and is left out)."""
    found: list[str] = []
    left_out: list[str] = []
    folders: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
            found.append(entry.path)
        elif entry.name.lower().endswith((*EXTENSIONS, *_OTHER_PICTURES)) or entry.is_dir():
            left_out.append(entry.path)
    for inner in folders:
        more, also_left_out = images_in(inner)
        found += more
        left_out += also_left_out
    return found, left_out


def left_out_line(images: ImageSet, what: str) -> str | None:
    """What to say about files of a set that look like images and are not read; None if there are none."""
    if not images.left_out:
        return None
    kinds = sorted({os.path.splitext(path)[1].lower() or "a linked folder" for path in images.left_out})
    return (f"left out of the {f'{what} ' if what else ''}images: {len(images.left_out)} files or linked folders that are not read "
            f"({', '.join(kinds)}), the first is {images.left_out[0]}")


def _from_packed(path: Path, split: str, class_to_index: Classes) -> ImageSet:
    packed = PackedImages(path)
    known = class_to_index or packed.class_to_index
    unknown = [name for name in packed.class_to_index if name not in known]
    if unknown:
        raise UserError(f"class '{unknown[0]}' in {path} is none of the {len(known)} classes of the training")
    renumbered = np.zeros(max(packed.class_to_index.values()) + 1, np.int32)
    for name, label in packed.class_to_index.items():
        renumbered[label] = known[name]
    return ImageSet(dict(known), renumbered[packed.labels], packed=packed)


def _from_list(path: Path, split: str, class_to_index: Classes) -> ImageSet:
    list_file = path if path.is_file() else path / f"{split}_list.txt"
    root = list_file.parent.resolve()
    try:
        lines = list_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"cannot read the list {list_file}: {getattr(failure, 'strerror', None) or _instead_of_text(path)}") from None
    paths: list[str] = []
    listed: list[int] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            image, label = _listed_image(line, f"{list_file} line {number}", root, split)
            paths.append(image)
            listed.append(label)
    if not paths:
        raise UserError(f"the list {list_file} names no image; it needs lines of 'PATH LABEL'")
    if not os.path.isfile(paths[0]):
        raise UserError(f"{list_file} names {paths[0]}, which does not exist")
    labels = np.array(listed, np.int32)
    known = class_to_index or _classes_of_list(paths, labels)
    contradictions = [(path, label) for path, label in zip(paths, listed)
                      if known.get(os.path.basename(os.path.dirname(path)), label) != label]
    if contradictions and class_to_index is not None:
        image, label = contradictions[0]
        name = os.path.basename(os.path.dirname(image))
        raise UserError(f"{list_file}: {len(contradictions)} of {len(paths)} labels contradict the class folders in their paths; the "
                        f"first is {image}, labelled {label}, while '{name}' is class {known[name]} of the training")
    outside = labels[labels > max(known.values())]
    if outside.size:
        raise UserError(f"{list_file} has label {outside[0]}, outside the {len(known)} classes of the training")
    return ImageSet(dict(known), labels, paths)


def _instead_of_text(path: Path) -> str:
    if path.suffix.lower() in EXTENSIONS:
        return "it is an image; name a folder of images"
    if path.stem.lower().endswith(PACKED):
        return f"it is a part of a packed set; name its first file, {path.stem}"
    return "it is not text"


def _listed_image(line: str, where: str, root: Path, split: str) -> tuple[str, int]:
    path, _, label = line.strip().rpartition(" ")
    path = path.strip()
    if not path or not label.isascii() or not label.isdigit() or int(label) > 10 ** 6:
        raise UserError(f"{where}: '{line.strip()[:_LISTED_BAD_LINE]}' is not 'PATH LABEL' with a label from 0")
    full = os.path.normpath(os.path.join(root, path))
    if "\0" in path or not full.startswith(str(root) + os.sep):
        raise UserError(f"{where}: '{path[:_LISTED_BAD_LINE]}' leaves the folder of the list")
    # Lists are written both ways: relative to the tree and relative to its train/ or val/ folder.
    in_split = os.path.join(root, split, path)
    return (in_split if not os.path.exists(full) and os.path.exists(in_split) else full), int(label)


def _classes_of_list(paths: list[str], labels: np.ndarray) -> dict[str, int]:
    """Class names of a list: the folder of each label's images if that is one folder per label, else the numbers."""
    folders: dict[int, set[str]] = {}
    for path, label in zip(paths, labels.tolist()):
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(path)))
    one_each = all(len(names) == 1 for names in folders.values())
    names = {label: next(iter(found)) for label, found in folders.items()}
    if one_each and len(set(names.values())) == len(names):
        return {names.get(label, str(label)): label for label in range(max(names) + 1)}
    return {str(label): label for label in range(max(names) + 1)}


def _cifar_source(cifar: Cifar) -> DataSource:
    return DataSource(lambda path, split: cifar.find(path) is not None, cifar.open)


# Formats of which one file may be the data set, whatever its name.
_OF_FILES = ("packed", "list")
# In the order in which they are asked; a folder of class folders is what anything else is taken for.
SOURCES: dict[str, DataSource] = {
    "packed": DataSource(lambda path, split: path.is_file() and is_packed(path), _from_packed),
    "cifar10": _cifar_source(CIFAR10),
    "cifar100": _cifar_source(CIFAR100),
    "list": DataSource(lambda path, split: path.is_file() or (path / f"{split}_list.txt").is_file(), _from_list),
    "folder": DataSource(lambda path, split: True, _from_folder),
}
