"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), in the binary and the Python form of their page."""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.dataset.image_set import ImageSet, are_numbers, follow_classes
from src.utils.errors import UserError

_PIXELS = 3 * 32 * 32
# What arrays in a pickle consist of. No other name in a pickle is looked up, so that no code runs.
_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}


@dataclass(frozen=True)
class CifarForm:
    """The files of one format: the archive's folder, and in it the parts and the class names.

    ``telling``: whether the file names alone identify the format; "train" does not.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    telling: bool = True

    @property
    def is_binary(self) -> bool:
        return self.test[0].endswith(".bin")

    def is_in(self, folder: Path) -> bool:
        """Whether ``folder`` holds a part of it."""
        any_part = any((folder / name).is_file() for name in (self.train[0], *self.test))
        return any_part and (self.telling or (folder / self.meta).is_file())


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets.

    Attributes:
        label_bytes: bytes before the pixels of a binary record, the last of which is the label.
        labels_key, names_key: where the Python form has labels and class names.
        classes: names of the classes where the meta file is missing.
    """

    name: str
    forms: tuple[CifarForm, ...]
    label_bytes: int
    labels_key: str
    names_key: str
    classes: tuple[str, ...]

    def find(self, path: Path) -> tuple[Path, CifarForm] | None:
        """The folder at or in ``path`` that holds the set, and its form; None if there is none."""
        return next(
            (
                (folder, form)
                for form in self.forms
                for folder in (path, path / form.folder)
                if form.is_in(folder)
            ),
            None,
        )

    def open(self, path: Path, split: str, class_to_index: Mapping[str, int] | None) -> ImageSet:
        """The training images for "train", else the test images.

        Raises:
            UserError: for files that are missing or damaged.
        """
        found = self.find(path)
        if found is None:
            raise UserError(
                f"'{path}' holds no {self.name}; it needs "
                f"{' or '.join(form.folder for form in self.forms)}"
            )
        folder, form = found
        parts = [
            self._read(folder / name, form)
            for name in (form.train if split == "train" else form.test)
        ]
        labels = np.concatenate([labels for labels, _ in parts]).astype(np.int32)
        if labels.size == 0 or labels.min() < 0 or labels.max() >= len(self.classes):
            raise UserError(f"{folder} holds labels that {self.name} does not have; fetch it again")
        pixels = (
            np.concatenate([pixels for _, pixels in parts])
            .reshape(-1, 3, 32, 32)
            .transpose(0, 2, 3, 1)
        )
        names = self._class_names(folder / form.meta, form)
        own = {name: label for label, name in enumerate(names)}
        known, notes = class_to_index or own, []
        has_numbers = are_numbers(names) or are_numbers(known)
        if has_numbers and len(known) == len(own) and set(known) != set(own):
            # One side does not know the names, which the files may lack.
            numbers = {str(label): label for label in own.values()}
            own = numbers if set(known) == set(numbers) else dict(known)
            first = min(own, key=own.__getitem__)
            notes.append(
                f"the classes of {folder} or those of training have no names, so '{names[0]}' is "
                f"taken for '{first}', and so on in order"
            )
        classes, labels = follow_classes(labels, own, class_to_index, folder)
        return ImageSet(classes, labels, pixels=np.ascontiguousarray(pixels), notes=tuple(notes))

    def _read(self, file: Path, form: CifarForm) -> tuple[np.ndarray, np.ndarray]:
        """Labels (N,) and pixels (N, 3072) uint8 of a file."""
        content = _content(file)
        if form.is_binary:
            size = self.label_bytes + _PIXELS
            if not content or len(content) % size:
                raise UserError(
                    f"{file} has {len(content)} bytes, which is not a whole number of {self.name} "
                    "records; fetch it again"
                )
            records = np.frombuffer(content, np.uint8).reshape(-1, size)
            return records[:, self.label_bytes - 1], records[:, self.label_bytes :]
        found = _unpickle(content, file)
        try:
            labels, pixels = np.array(found[self.labels_key]), found["data"]
            if (
                labels.dtype.kind in "iu"
                and pixels.dtype == np.uint8
                and pixels.shape == (len(labels), _PIXELS)
                and labels.ndim == 1
            ):
                return labels.astype(np.int64), pixels
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            pass
        raise UserError(
            f"{file} does not hold {self.labels_key} and data of {self.name}; fetch it again"
        )

    def _class_names(self, file: Path, form: CifarForm) -> tuple[str, ...]:
        if not file.is_file():
            return self.classes
        names = (
            _content(file).decode("utf-8", "replace").split()
            if form.is_binary
            else [str(name) for name in _unpickle(_content(file), file).get(self.names_key, ())]
        )
        return tuple(names) if len(set(names)) == len(names) == len(self.classes) else self.classes


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module, name)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as failure:
        raise UserError(f"cannot read {file}: {failure.strerror}") from None


def _unpickle(content: bytes, file: Path) -> dict[str, Any]:
    try:
        # Python 2 wrote them: latin1 keeps its strings, arrays' among them, byte for byte.
        found = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as failure:
        raise UserError(f"{file} is damaged, or contains code: {failure}") from None
    except Exception as failure:  # a damaged pickle fails in any way
        raise UserError(f"{file} is damaged: {type(failure).__name__}; fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} does not hold a table; fetch it again")
    # Python 3 keeps the keys of Python 2 as bytes if it was asked to.
    return {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in found.items()}


_TEN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10 = Cifar(
    "CIFAR-10",
    (
        CifarForm(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _TEN),
            ("test_batch.bin",),
            "batches.meta.txt",
        ),
        CifarForm("cifar-10-batches-py", _TEN, ("test_batch",), "batches.meta"),
    ),
    1,
    "labels",
    "label_names",
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR100 = Cifar(
    "CIFAR-100",
    (
        CifarForm("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt"),
        CifarForm("cifar-100-python", ("train",), ("test",), "meta", telling=False),
    ),
    2,
    "fine_labels",
    "fine_label_names",
    tuple(str(label) for label in range(100)),
)
