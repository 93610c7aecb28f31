"""Inspects a data set before training: undecodable files, likely problems, a preview picture."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from src.cli.config import Config
from src.dataset.augmentations import Augmenter
from src.dataset.decoding import (
    DEFAULT_MAX_PIXELS,
    BadImage,
    decode_image,
    looks_whole,
    open_picture,
    open_regular,
    read_image,
)
from src.dataset.image_set import ImageSet
from src.dataset.splits import left_out_message
from src.dataset.transforms import eval_min_side, eval_transform, thumbnail
from src.utils.errors import UserError
from src.utils.files import write_atomically
from src.utils.log import escaped

_CHUNK = 32


@dataclass(frozen=True)
class Finding:
    """A file and what is wrong with it; ``bad`` is False if it can be decoded all the same."""

    path: str
    reason: str
    bad: bool


def check_has_files(data_path: str, sets: Mapping[str, ImageSet]) -> None:
    """Raise UserError if the images are not separate files."""
    if all(images.paths is None for images in sets.values()):
        raise UserError(
            f"the images of '{data_path}' are not separate files, so there is nothing to check"
        )


def check_files(
    paths: Sequence[str], workers: int, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Iterator[Finding | None]:
    """Yield a Finding or None for each of ``paths``, in order, decoded by ``workers`` processes."""
    check = partial(_check_file, max_pixels=max_pixels)
    with ProcessPoolExecutor(workers, initializer=_redirect_output) as pool:
        yield from pool.map(check, paths, chunksize=_CHUNK)


def summary(images: ImageSet) -> str:
    """One line on the classes of an ImageSet."""
    counts = np.bincount(images.labels, minlength=images.num_classes)
    least, most = counts.min(), counts.max()
    return f"{len(images)} images, {images.num_classes} classes of {least} to {most} images"


def _check_file(path: str, max_pixels: int) -> Finding | None:
    with warnings.catch_warnings(record=True) as damages:
        warnings.simplefilter("always")
        try:
            read_image(path, max_pixels)
        except BadImage as failure:
            _take_output()
            return Finding(path, str(failure).removeprefix(path).strip(), bad=True)
    said = _take_output()
    if damages:
        return Finding(path, str(damages[0].message).removeprefix(path).strip(), bad=False)
    return Finding(path, f"decodes with a warning: {said}", bad=False) if said else None


def _redirect_output() -> None:
    """Send standard error to a file, in a worker process.

    libpng reports damaged data only there.
    """
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)


def _take_output() -> str:
    """The first line that was written to the file, which is empty afterwards."""
    os.lseek(2, 0, os.SEEK_SET)
    text = os.read(2, 200).decode(errors="replace").strip()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return text.splitlines()[0] if text else ""


# Report a class that has this many times the images of another.
_IMBALANCE = 10
_FEW_IMAGES = 10
# Below this fraction of image_size a side is mostly made up by resizing. Above this many megapixels
# decoding takes most of the time.
_TINY, _HUGE_MEGAPIXELS = 0.5, 24
_NAMED = 3
_ROWS, _AUGMENTED = 6, 4
_CLASSES_DRAWN = 40


class ImageInfo(NamedTuple):
    """An image's content as a hash, and its size in pixels, (0, 0) if its header says none."""

    digest: bytes
    width: int
    height: int


def inspect_images(images: ImageSet, workers: int, advance: Callable[[], None]) -> list[ImageInfo]:
    """The ImageInfo of every image. ``advance`` is called after each."""

    def look(index: int) -> ImageInfo:
        found = _look(images, index)
        advance()
        return found

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(look, range(len(images))))


def find_problems(
    sets: Mapping[str, ImageSet], looks: Mapping[str, Sequence[ImageInfo]], config: Config
) -> list[str]:
    """What seems wrong with {part: ImageSet}, a line each."""
    train = sets["train"]
    # Parts of one folder leave out the same.
    left_out = dict.fromkeys(
        filter(None, (left_out_message(images, "") for images in sets.values()))
    )
    return [*left_out, *_of_classes(train), *_duplicates(sets, looks), *_sizes(sets, looks, config)]


def draw(sets: Mapping[str, ImageSet], config: Config, path: str) -> None:
    """Draw a data set into a PNG file.

    Shows training images next to four augmented versions, validation images as evaluation crops
    them, and a histogram of the classes.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, validation = sets["train"], sets.get("val", sets["train"])
    figure = Figure(figsize=(12, 2 * _ROWS + 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=(2 * _ROWS, 3.5))
    pictures, histogram = halves
    left, right = pictures.subfigures(1, 2, width_ratios=(_AUGMENTED + 1, 2))
    left.suptitle("training: as it is, and as the network sees it", fontsize=11)
    whose = "" if "val" in sets else " of training images, as there are no others"
    right.suptitle(f"evaluation{whose}: as it is, and its crop", fontsize=11)
    names = {label: name for name, label in train.class_to_index.items()}
    augmenter = Augmenter(config, len(train), train.num_classes)

    def augmented(index: int) -> list[np.ndarray]:
        image = train.load(index, augmenter.min_side)

        def load(at: int) -> tuple[np.ndarray, int]:
            other = train.load(at, augmenter.min_side) if at != index else image
            return other, int(train.labels[at])

        samples = (augmenter.sample(load, epoch, index)[0] for epoch in range(_AUGMENTED))
        return [thumbnail(image), *samples]

    def evaluated(index: int) -> list[np.ndarray]:
        image = validation.load(index, eval_min_side(config))
        return [thumbnail(image), eval_transform(image, config)]

    _grid(left, train, names, augmented)
    _grid(right, validation, names, evaluated)
    axes = histogram.subplots()
    counts = np.bincount(train.labels, minlength=train.num_classes)
    order = np.argsort(-counts, kind="stable")
    axes.bar(np.arange(len(counts)), counts[order], color="tab:blue")
    axes.set(
        title="training images of each class, the largest first", xlim=(-0.6, len(counts) - 0.4)
    )
    if len(counts) <= _CLASSES_DRAWN:
        axes.set_xticks(
            range(len(counts)),
            [escaped(names.get(int(label), label))[:20] for label in order],
            rotation=45,
            ha="right",
            parse_math=False,
        )
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=90, format="png"))


def _grid(
    figure: Any, images: ImageSet, names: Mapping[int, str], row: Callable[[int], list[np.ndarray]]
) -> None:
    spread = np.unique(np.linspace(0, len(images) - 1, 3 * _ROWS).astype(int)).tolist()
    shown: dict[int, list[np.ndarray]] = {}
    # The second and third thirds only stand in for images that cannot be decoded.
    for index in (*spread[1::3], *spread[::3], *spread[2::3]):
        if len(shown) < _ROWS:
            with suppress(BadImage):
                shown[index] = row(index)
    chosen = sorted(shown.items())
    grid = np.atleast_2d(
        figure.subplots(max(len(chosen), 1), max((len(found) for _, found in chosen), default=1))
    )
    for axes in grid.flat:
        axes.axis("off")
    for line, (index, found) in zip(grid, chosen):
        for axes, image in zip(line, found):
            axes.imshow(image)
        line[0].set_title(
            escaped(names.get(int(images.labels[index]), images.labels[index]))[:24],
            fontsize=8,
            parse_math=False,
        )


def _look(images: ImageSet, index: int) -> ImageInfo:
    if images.paths is not None:
        try:
            with open_regular(images.paths[index]) as file:
                content = file.read()
        except OSError:
            return ImageInfo(b"", 0, 0)
        try:
            picture = open_picture(content)
        except MemoryError:
            raise
        except Exception:  # each format has its own kinds; the caller counts and names such images
            return ImageInfo(b"", 0, 0)
        try:
            if not looks_whole(content[:4], content[-64:]):
                decode_image(np.frombuffer(content, np.uint8), "", images.max_pixels)
        except BadImage:
            return ImageInfo(b"", 0, 0)
        return ImageInfo(_hash(content), *picture.size)
    try:
        pixels = images.load(index)
    except BadImage:
        return ImageInfo(b"", 0, 0)
    return ImageInfo(_hash(np.ascontiguousarray(pixels)), pixels.shape[1], pixels.shape[0])


def _hash(content: bytes | np.ndarray) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()  # type: ignore[arg-type]


def _of_classes(images: ImageSet) -> list[str]:
    names = {label: escaped(name) for name, label in images.class_to_index.items()}
    counts = np.bincount(images.labels, minlength=images.num_classes)
    most, least = int(counts.argmax()), int(counts.argmin())
    found = []
    if counts[most] > _IMBALANCE * max(counts[least], 1):
        found.append(
            f"the class '{names.get(most, most)}' has {counts[most]} images and "
            f"'{names.get(least, least)}' {counts[least]}: "
            "the network will prefer the larger ones"
        )
    few = [names.get(label, str(label)) for label in np.flatnonzero(counts < _FEW_IMAGES).tolist()]
    if few:
        found.append(
            f"{len(few)} of {len(counts)} classes have fewer than {_FEW_IMAGES} training images: "
            f"{_first(few)}"
        )
    return found


def _duplicates(
    sets: Mapping[str, ImageSet], looks: Mapping[str, Sequence[ImageInfo]]
) -> list[str]:
    seen: dict[bytes, int] = {}
    twice: list[str] = []
    contradicting: list[str] = []
    train = sets["train"]
    for index, look in enumerate(looks["train"]):
        if look.digest and look.digest in seen:
            first = seen[look.digest]
            (twice if train.labels[first] == train.labels[index] else contradicting).append(
                train.name(index)
            )
        seen.setdefault(look.digest, index)
    found = []
    if contradicting:
        found.append(
            f"{len(contradicting)} training images are the same as one of another class: "
            f"{_first(contradicting)}"
        )
    if twice:
        found.append(f"{len(twice)} training images are duplicates: {_first(twice)}")
    if "val" in sets:
        both = [
            sets["val"].name(index)
            for index, look in enumerate(looks["val"])
            if look.digest and look.digest in seen
        ]
        if both:
            found.append(
                f"{len(both)} validation images are training images too, which makes the accuracy "
                f"look too high: {_first(both)}"
            )
    return found


def _sizes(
    sets: Mapping[str, ImageSet], looks: Mapping[str, Sequence[ImageInfo]], config: Config
) -> list[str]:
    every = [
        (sets[part].name(index), look) for part in sets for index, look in enumerate(looks[part])
    ]
    unreadable = [name for name, look in every if not look.width]
    tiny = [
        name
        for name, look in every
        if look.width and min(look.width, look.height) < _TINY * config.image_size
    ]
    huge = [name for name, look in every if look.width * look.height > _HUGE_MEGAPIXELS * 10**6]
    found = []
    if unreadable:
        found.append(
            f"{len(unreadable)} images cannot be read: {_first(unreadable)}; "
            "scripts/check_dataset.py says why"
        )
    if tiny:
        found.append(
            f"{len(tiny)} images have a side below {round(_TINY * config.image_size)} pixels, half "
            f"of image_size={config.image_size}: {_first(tiny)}"
        )
    if huge:
        found.append(
            f"{len(huge)} images have more than {_HUGE_MEGAPIXELS} megapixels and decode slowly: "
            f"{_first(huge)}; scripts/pack_dataset.py --short_side shrinks them once and for all"
        )
    return found


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(escaped, names[:_NAMED])) + (" ..." if len(names) > _NAMED else "")
