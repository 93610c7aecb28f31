"""Labelled images, wherever they come from."""

import hashlib
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from src.dataset.decoding import DEFAULT_MAX_PIXELS, decode_image, open_regular, read_image
from src.utils.errors import UserError
from src.utils.log import WARNING

# Ranks compare this many class names one by one, so that a message can name the first difference;
# they compare the rest by a checksum.
_COMPARED_CLASSES = 50
_MEASURED_FILES = 100_000
# Files are compared by their content if there are not more, and those of equal size are not larger
# together.
_COMPARED_BYTES = 1 << 28


class EncodedImages(Protocol):
    """Encoded image files that are stored together, such as a packed set.

    Attributes:
        checksum: by which other images are recognised.
    """

    checksum: int

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of image ``index``, (N,) uint8."""

    def size(self, index: int) -> int:
        """The number of these bytes."""

    def name(self, index: int) -> str:
        """How messages refer to image ``index``."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, each known by its index.

    Attributes:
        class_to_index: class name -> label, labels from 0.
        labels: (N,) int32.
        paths: N image files, or None if ``pixels`` or ``packed`` holds the images.
        pixels: (N, H, W, 3) uint8 RGB, or None.
        packed: encoded images of a packed set, or None.
        rows: (N,) places of the images in ``pixels`` or ``packed``; None for all in order.
        left_out: files and linked folders that are not read.
        notes: other sentences that the user should read.
        max_pixels: larger images are refused.
        most_classes: the classes of the network, if some at the end have no name here.
        is_list: whether somebody wrote the labels down, so that they count and not the class names.
    """

    class_to_index: dict[str, int]
    labels: np.ndarray
    paths: list[str] | None = None
    pixels: np.ndarray | None = None
    packed: EncodedImages | None = None
    rows: np.ndarray | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    max_pixels: int = DEFAULT_MAX_PIXELS
    most_classes: int = 0
    is_list: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """One more than the highest label that an image can have."""
        return max(self.most_classes, max(self.class_to_index.values()) + 1)

    def name(self, index: int) -> str:
        """What to call image ``index`` in a message."""
        if self.paths is not None:
            return self.paths[index]
        return (
            self.packed.name(self._row(index))
            if self.packed is not None
            else f"record {self._row(index)}"
        )

    def summary(self, what: str) -> dict[str, Any]:
        """What ranks compare of their images: counts, labels, classes, names and sizes.

        Args:
            what: a word for the set, as in "training".
        """
        classes = sorted(self.class_to_index, key=lambda name: self.class_to_index[name])
        return {
            f"number of {what} images": len(self),
            f"number of {what} classes": len(classes),
            **{
                f"{what} class {label}": name
                for label, name in enumerate(classes[:_COMPARED_CLASSES])
            },
            f"checksum of {what} class names": zlib.crc32(
                "\0".join(classes).encode("utf-8", "surrogatepass")
            ),
            f"checksum of {what} labels": zlib.crc32(self.labels.data),
            f"checksum of names and sizes of {what} images": self.fingerprint(),
        }

    def fingerprint(self) -> int:
        """Checksum that changes if images, labels or classes change.

        For files it covers the names with their folders and, unless there are very many, the
        sizes, but not the path: the same images may be at another place on another machine.
        """
        classes = sorted(self.class_to_index.items(), key=lambda item: item[1])
        checksum = zlib.crc32(repr(classes).encode("utf-8", "surrogatepass"))
        checksum = zlib.crc32(np.ascontiguousarray(self.labels).data, checksum)
        for path in self.paths or ():
            name = "/".join(path.split(os.sep)[-2:])
            size = _size(path) if len(self) <= _MEASURED_FILES else ""
            checksum = zlib.crc32(f"{name} {size}".encode("utf-8", "surrogatepass"), checksum)
        if self.packed is not None:
            checksum = zlib.crc32(str(self.packed.checksum).encode(), checksum)
        if self.pixels is not None:
            checksum = zlib.crc32(np.ascontiguousarray(self.pixels).data, checksum)
        return checksum if self.rows is None else zlib.crc32(self.rows.tobytes(), checksum)

    def looks_like(self, other: "ImageSet") -> bool:
        """Whether a few images, spread over the set, have the same pixels in ``other``."""
        places = {place * len(self) // 10 for place in range(10)}
        try:
            return len(self) == len(other) and all(
                np.array_equal(self.load(place), other.load(place)) for place in places
            )
        except UserError:
            return False

    def load(self, index: int, min_side: int = 0) -> np.ndarray:
        """Image ``index`` as (H, W, 3) uint8 RGB.

        Args:
            min_side: see ``decode_image``.

        Raises:
            BadImage: if its file cannot be decoded.
        """
        if self.pixels is not None:
            return self.pixels[self._row(index)]
        if self.packed is not None:
            encoded = self.packed.encoded(self._row(index))
            return decode_image(encoded, self.name(index), self.max_pixels, min_side)
        return read_image(self.name(index), self.max_pixels, min_side)

    def content(self, index: int) -> bytes:
        """The bytes of image ``index``: its file, or its pixels.

        Raises:
            OSError: if the file cannot be read.
            BadImage: if it has changed in a packed set.
        """
        if self.pixels is not None:
            return self.pixels[self._row(index)].tobytes()
        if self.packed is not None:
            return self.packed.encoded(self._row(index)).tobytes()
        with open_regular(self.name(index)) as file:
            return file.read()

    def size(self, index: int) -> int:
        """Length of ``content``; -1 for a file that is missing."""
        if self.pixels is not None:
            return self.pixels[0].nbytes
        if self.packed is not None:
            return self.packed.size(self._row(index))
        return _size(self.name(index))

    def split(self, fraction: float, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """(the other images, images drawn by ``seed``): a random split, stratified by class.

        ``fraction`` of each class is drawn, rounded, but never a class's only image.
        """
        drawn: list[int] = []
        for label in np.unique(self.labels).tolist():
            members = np.flatnonzero(self.labels == label)
            count = min(max(round(len(members) * fraction), 1), len(members) - 1)
            random = np.random.Generator(np.random.Philox(key=np.array([seed, label], np.uint64)))
            drawn += random.permutation(members)[:count].tolist()
        part = np.zeros(len(self), bool)
        part[drawn] = True
        return self.at(np.flatnonzero(~part)), self.at(np.flatnonzero(part))

    def at(self, places: np.ndarray) -> "ImageSet":
        """The images at ``places``, (M,) int."""
        if self.paths is not None:
            return replace(
                self, labels=self.labels[places], paths=[self.paths[place] for place in places]
            )
        return replace(
            self,
            labels=self.labels[places],
            rows=places if self.rows is None else self.rows[places],
        )

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])


def content_keys(sets: Sequence[ImageSet]) -> list[list[bytes | None]]:
    """For each set, the keys of its images, which share a key only if their content is the same.

    The content is that of a file, also in a packed set, or an array of pixels. None for an image
    whose size no other image has. All keys are None if there are too many images, or if comparing
    them would take too long.
    """
    if sum(map(len, sets)) > _MEASURED_FILES:
        return [[None] * len(images) for images in sets]
    sizes = [[images.size(index) for index in range(len(images))] for images in sets]
    counts = Counter(size for part in sizes for size in part if size > 0)
    shared = {size for size, count in counts.items() if count > 1}
    if sum(size * counts[size] for size in shared) > _COMPARED_BYTES:
        shared = set()
    return [
        [_content_key(images, index) if size in shared else None for index, size in enumerate(part)]
        for images, part in zip(sets, sizes)
    ]


def _content_key(images: ImageSet, index: int) -> bytes | None:
    try:
        return hashlib.blake2b(images.content(index), digest_size=16).digest()
    except (OSError, UserError):
        # It is reported when it is decoded.
        return None


def duplicate_messages(train: ImageSet, validation: ImageSet | None) -> list[str]:
    """Messages on images that are in two classes, or in both training and validation."""
    of_train, *others = content_keys([train] if validation is None else [train, validation])
    found = [_contradiction_message(train, of_train)]
    if validation is not None:
        copies = _shared_images(train, of_train, validation, others[0])
        found.append(_overlap_message(validation, copies))
    return [message for message in found if message]


def overlap_message(train: ImageSet, validation: ImageSet) -> str | None:
    """A message on validation images that are training images too; None if there are none."""
    return _overlap_message(validation, shared_images(train, validation))


def shared_images(train: ImageSet, validation: ImageSet) -> list[str]:
    """Names of the validation images that are training images too, under any name."""
    of_train, of_validation = content_keys([train, validation])
    return _shared_images(train, of_train, validation, of_validation)


def _shared_images(
    train: ImageSet,
    of_train: Sequence[bytes | None],
    validation: ImageSet,
    of_validation: Sequence[bytes | None],
) -> list[str]:
    known, paths = set(of_train) - {None}, set(train.paths or ())
    names = map(validation.name, range(len(validation)))
    return [name for name, key in zip(names, of_validation) if key in known or name in paths]


def _overlap_message(validation: ImageSet, copies: Sequence[str]) -> str | None:
    if not copies:
        return None
    return (
        f"{WARNING}{len(copies)} of {len(validation)} validation images are training images too, "
        f"such as {copies[0]}; the accuracy says little about unseen images"
    )


def _contradiction_message(train: ImageSet, keys: Sequence[bytes | None]) -> str | None:
    seen: dict[bytes, int] = {}
    found: list[tuple[int, int]] = []
    for index, key in enumerate(keys):
        if key is None:
            continue
        first = seen.setdefault(key, index)
        if train.labels[first] != train.labels[index]:
            found.append((first, index))
    if not found:
        return None
    one, other = map(train.name, found[0])
    return (
        f"{WARNING}{len(found)} training images are the same as one of another class, such as "
        f"{one} and {other}"
    )


def _size(path: str) -> int:
    """Bytes of a file; -1 for one that is missing, which is reported when it is read."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def follow_classes(
    labels: np.ndarray, own: Mapping[str, int], known: Mapping[str, int] | None, where: object
) -> tuple[dict[str, int], np.ndarray]:
    """(class map, labels): ``labels`` of the class map ``own`` as the class map ``known`` has them.

    Without ``known`` both stay as they are.

    Args:
        where: names the images in a message.

    Raises:
        UserError: if ``own`` has a class that ``known`` does not have.
    """
    if known is None:
        return dict(own), labels
    new_labels = np.zeros(max(own.values()) + 1, np.int32)
    for name, label in own.items():
        new_labels[label] = find_class(name, known, where)
    return dict(known), new_labels[labels]


def check_labels(
    labels: np.ndarray, own: Mapping[str, int], known: Mapping[str, int], where: object
) -> None:
    """Check labels that were written down, which count as they are.

    Raises:
        UserError: if a class has another label in ``known``, or if a label is not there.
    """
    names = composed(known)
    for name, label in composed(own).items():
        if name != str(label) and names.get(name, label) != label:
            raise UserError(
                f"{where} labels the class '{name}' {label}, and it is class {names[name]} in "
                "training"
            )
    if labels.max() > max(known.values()):
        raise UserError(
            f"{where} has label {labels.max()}, outside the {len(known)} training classes"
        )


def find_class(name: str, known: Mapping[str, int], where: object) -> int:
    """The label of a class. Letters with accents may be written in any form of Unicode.

    Raises:
        UserError: if ``known`` does not have it.
    """
    if name in known:
        return known[name]
    label = composed(known).get(unicodedata.normalize("NFC", name))
    if label is None:
        raise UserError(f"class '{name}' in {where} is none of the {len(known)} training classes")
    return label


def are_numbers(names: Iterable[str]) -> bool:
    """Whether class names are nothing but numbers."""
    return all(name.isascii() and name.isdigit() for name in names)


def are_numbers_sorted_as_text(classes: Mapping[str, int]) -> bool:
    """Whether class names are numbers, and labels follow the order of text: 0, 1, 10, 11, 2."""
    if not are_numbers(classes):
        return False
    return sorted(classes, key=classes.__getitem__) != sorted(classes, key=int)


def composed(classes: Mapping[str, int]) -> dict[str, int]:
    """The class map with names in Unicode's composed form, NFC."""
    return {unicodedata.normalize("NFC", name): label for name, label in classes.items()}


def class_names(class_to_index: Mapping[str, int] | None, classes: int) -> list[str]:
    """Names in the order of labels; numbers for classes without one."""
    names = {label: name for name, label in (class_to_index or {}).items()}
    return [names.get(label, str(label)) for label in range(classes)]
