"""The table of data sources, and the function that opens any of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from src.dataset.cifar import CIFAR10, CIFAR100, Cifar
from src.dataset.class_folders import SPLITS, is_litter, open_class_folders
from src.dataset.image_set import ImageSet, check_labels, follow_classes
from src.dataset.list_files import is_list, open_list
from src.dataset.packed import ENDING as PACKED
from src.dataset.packed import PackedImages, is_packed
from src.utils.errors import UserError, suggestion

DIGITS_FOLDER = Path(__file__).resolve().parents[2] / "data" / "digits"
Classes = Mapping[str, int] | None


@dataclass(frozen=True)
class DataSource:
    """One form in which data sets come.

    Attributes:
        recognise: (path, split) -> whether ``path``, which exists, holds such a data set.
        open: (path, split, class_to_index) -> its ImageSet; see ``open_images``.
        may_be_file: whether the data set may be a single file, whatever its name.
    """

    recognise: Callable[[Path, str], bool]
    open: Callable[[Path, str, Classes], ImageSet]
    may_be_file: bool = False


def open_images(
    data_path: str, split: str, dataset_format: str = "auto", class_to_index: Classes = None
) -> ImageSet:
    """Open the images that ``data_path`` names.

    Args:
        data_path: "digits"; a folder with one folder per class; a root with train/ and val/, or
            with train_list.txt and val_list.txt; a list file with "PATH LABEL" lines; a packed
            set; a folder with the files of CIFAR-10 or CIFAR-100.
        split: "train" or "val": which part of a root, of CIFAR or of the digits.
        dataset_format: a name in SOURCES; "folder"; or "auto" for the first source that recognises
            the path, and class folders if none does.
        class_to_index: the class map from training. Labels follow it, so that a class without
            images does not shift the labels of others.

    Raises:
        UserError: if there is no such data, a class is empty or unknown, or a list has a bad line.
    """
    if not data_path:
        raise UserError(
            "this recipe needs data: pass --data_path=DIR (a folder with one folder of images per "
            "class)"
        )
    check_source(dataset_format)
    if data_path == "digits":
        bundled = _source_of(DIGITS_FOLDER, split, dataset_format)
        images = bundled.open(DIGITS_FOLDER, split, class_to_index)
        return replace(images, notes=(*images.notes, *_other_digits()))
    path = Path(data_path)
    if not path.exists():
        raise UserError(
            f"data_path '{data_path}' does not exist; pass --data_path=DIR, or link your data to "
            "that name"
        )
    return _source_of(path, split, dataset_format).open(path, split, class_to_index)


def _source_of(path: Path, split: str, dataset_format: str) -> DataSource:
    named = {**SOURCES, "folder": FALLBACK}.get(dataset_format)
    if named is not None and (path.is_dir() or named.may_be_file):
        return named
    if all(cifar.find(path) for cifar in (CIFAR10, CIFAR100)):
        raise UserError(
            f"'{path}' holds both CIFAR-10 and CIFAR-100; choose with --dataset_format=cifar10 or "
            "cifar100, or name the folder of one"
        )
    recognised = (source for source in SOURCES.values() if source.recognise(path, split))
    return next(recognised, FALLBACK)


def _other_digits() -> list[str]:
    """A note if "digits" may have been meant as a folder."""
    if not Path("digits").is_dir() or Path("digits").resolve() == DIGITS_FOLDER:
        return []
    return ["--data_path=digits is the bundled digits; --data_path=./digits is the folder here"]


def check_source(dataset_format: str) -> None:
    """Raise UserError for an unknown dataset_format."""
    known = ("auto", *SOURCES, "folder")
    if dataset_format not in known:
        near = suggestion(dataset_format, known)
        raise UserError(
            f"unknown dataset_format={dataset_format}{near}; available: {', '.join(known)}"
        )


def holds_cifar(path: Path) -> bool:
    """Whether CIFAR-10 or CIFAR-100 is at or in ``path``."""
    return any(cifar.find(path) for cifar in (CIFAR10, CIFAR100))


def find_packed(path: Path, split: str) -> Path | None:
    """The packed set at ``path``, or the one for ``split`` in a folder without class folders."""
    if not path.is_dir():
        return path if is_packed(path) else None
    names = (f"{name}{PACKED}" for group in SPLITS[split] for name in group)
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found and any(entry.is_dir() and not is_litter(entry.name) for entry in path.iterdir()):
        return None
    return found


def _open_packed(path: Path, split: str, class_to_index: Classes) -> ImageSet:
    path = find_packed(path, split) or path
    packed = PackedImages(path)
    labels, classes = packed.labels, packed.class_to_index
    if packed.is_list:
        if class_to_index is not None:
            check_labels(labels, classes, class_to_index, path)
        return ImageSet(dict(class_to_index or classes), labels, packed=packed, is_list=True)
    classes, labels = follow_classes(labels, classes, class_to_index, path)
    return ImageSet(classes, labels, packed=packed)


def _cifar_source(cifar: Cifar) -> DataSource:
    return DataSource(lambda path, split: cifar.find(path) is not None, cifar.open)


# Tried in this order.
SOURCES: dict[str, DataSource] = {
    "packed": DataSource(
        lambda path, split: find_packed(path, split) is not None, _open_packed, may_be_file=True
    ),
    "cifar10": _cifar_source(CIFAR10),
    "cifar100": _cifar_source(CIFAR100),
    "list": DataSource(is_list, open_list, may_be_file=True),
}
# Any path that no source recognises is a folder of class folders.
FALLBACK = DataSource(lambda path, split: True, open_class_folders)
