"""Input by ``mindspore.dataset``, as users of the MindSpore model zoo know it.

``create_dataset`` is the model zoo's function: class folders, decoded, augmented and normalised by
MindSpore. ``--input_pipeline=mindspore`` trains and evaluates with the same operations. The other
way round, ``as_dataset`` makes this program's own batches a ``mindspore.dataset``.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mindspore.dataset as ds
import numpy as np
from mindspore.dataset import vision

from src.cli.config import Config
from src.dataset.batches import PADDING_LABEL, Batch, EvalBatches, TrainBatches
from src.dataset.class_folders import is_litter
from src.dataset.image_set import ImageSet
from src.models.layers import scale_and_offset
from src.utils.errors import UserError
from src.utils.machine import available_cores

_INTERPOLATIONS = {"bilinear": vision.Inter.LINEAR, "bicubic": vision.Inter.BICUBIC}
# What ImageFolderDataset takes by default.
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
# It does not decode those of the last kind.
_DECODED = _EXTENSIONS[:-1]
_COMPARED_FILES = 8

_Batches = Iterator[tuple[np.ndarray, np.ndarray]]


def create_dataset(
    path: str,
    config: Config,
    training: bool,
    num_shards: int = 1,
    shard_id: int = 0,
    class_to_index: dict[str, int] | None = None,
) -> ds.Dataset:
    """Batches of class folders: image (B, 3, S, S) float32, normalised, and label (B,) int32.

    Training is shuffled and augmented, and leaves out the last incomplete batch. Each shard has the
    same number of images, so MindSpore may repeat some.

    Args:
        path: folder with a folder of images for each class.
        config: its keys of augmentation, preprocessing, per_batch_size and num_parallel_workers.
        num_shards, shard_id: number of ranks, and which one this is.
        class_to_index: labels of the classes; by default their places among the folders' names.

    Raises:
        UserError: for augmentations that MindSpore does not have in this form.
    """
    check_pipeline(config, training)
    workers = config.num_parallel_workers or available_cores()
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    classes = [name for name in names if not is_litter(name)]
    shards = {} if num_shards == 1 else {"num_shards": num_shards, "shard_id": shard_id}
    dataset = ds.ImageFolderDataset(
        path,
        num_parallel_workers=workers,
        shuffle=training,
        class_indexing=class_to_index or {name: label for label, name in enumerate(classes)},
        **shards,
    )
    operations = train_operations(config) if training else eval_operations(config)
    mean, std = ([255 * value for value in values] for values in (config.mean, config.std))
    operations += [vision.Normalize(mean, std), vision.HWC2CHW()]
    dataset = dataset.map(operations, "image", num_parallel_workers=workers)
    return dataset.batch(config.per_batch_size, drop_remainder=training)


def as_dataset(batches: TrainBatches) -> ds.Dataset:
    """One epoch of this program's own batches, as (image, label) like those of ``create_dataset``.

    Each pass over it yields the next epoch, beginning with 0; so does asking it for its shapes.
    """
    return ds.GeneratorDataset(_Epochs(batches), ["image", "label"], shuffle=False)


class _Epochs:
    """Iterates over the next epoch, each time that it is iterated over."""

    def __init__(self, batches: TrainBatches) -> None:
        self._batches, self._epoch = batches, 0
        self._scale, self._offset = scale_and_offset(batches.config.mean, batches.config.std)

    def __len__(self) -> int:
        return self._batches.per_epoch

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first = self._epoch * len(self)
        self._epoch += 1
        for number in range(first, first + len(self)):
            batch = self._batches[number]
            yield (batch.images * self._scale + self._offset).transpose(0, 3, 1, 2), batch.labels


def check_pipeline(config: Config, training: bool) -> None:
    """Raise UserError for keys that this pipeline does not have."""
    if config.antialias:
        raise UserError("input_pipeline=mindspore cannot antialias: --antialias=0")
    if not training:
        return
    others = [name for name in config.augmentations if name not in ("crop", "flip", "color_jitter")]
    if others:
        raise UserError(
            f"input_pipeline=mindspore has crop, flip and color_jitter without arguments, not "
            f"{others[0]}; leave it out of --augmentations, or use --input_pipeline=own"
        )
    if config.bad_samples != "error":
        raise UserError(
            f"input_pipeline=mindspore stops at an image that cannot be decoded: "
            f"bad_samples={config.bad_samples} needs --input_pipeline=own"
        )


def train_operations(config: Config) -> list[Any]:
    """From an encoded image to (S, S, 3) uint8: crop, then the others of ``augmentations``."""
    size, inter = config.image_size, _INTERPOLATIONS[config.interpolation]
    crops = {
        "random_resized": [
            vision.RandomCropDecodeResize(size, config.crop_scale, config.crop_ratio, inter)
        ],
        "padded": [
            vision.Decode(),
            vision.Resize((size, size), inter),
            vision.RandomCrop(size, config.crop_padding),
        ],
        "resize": [vision.Decode(), vision.Resize((size, size), inter)],
    }
    jitter = [(max(1 - strength, 0), 1 + strength) for strength in config.color_jitter]
    entries = {
        "flip": [vision.RandomHorizontalFlip(config.flip_probability)],
        "color_jitter": [vision.RandomColorAdjust(*jitter)] if any(config.color_jitter) else [],
    }
    kind = config.train_crop if "crop" in config.augmentations else "resize"
    rest = [entries[name] for name in config.augmentations if name != "crop"]
    return [operation for part in [crops[kind], *rest] for operation in part]


def eval_operations(config: Config) -> list[Any]:
    """From an encoded image to (S, S, 3) uint8: resize, then crop the centre."""
    side, inter = config.resized_side, _INTERPOLATIONS[config.interpolation]
    resized = (side, side) if config.eval_resize_mode == "square" else side
    return [vision.Decode(), vision.Resize(resized, inter), vision.CenterCrop(config.image_size)]


class MindSporeTrainBatches(TrainBatches):
    """``TrainBatches`` whose images are decoded and augmented by MindSpore.

    The global batch of a step has the same images. What the augmentations draw depends on the
    number of ranks and threads, and on where a run was resumed.
    """

    # MindSpore has threads of its own. If its pipeline fails in another thread than the main one,
    # it ends the process.
    reads_ahead = True

    def __init__(self, images: ImageSet, config: Config, rank: int, size: int) -> None:
        super().__init__(images, config, rank, size)
        check_pipeline(config, training=True)
        self._folder = _Folder(images, config)

    def __getitem__(self, number: int) -> Batch:
        return Batch(*self._folder.batch(number, self._rest_of_epoch))

    def _rest_of_epoch(self, number: int) -> _Batches:
        epoch = number // self.per_epoch
        parts = [self.samples(n)[0] for n in range(number, (epoch + 1) * self.per_epoch)]
        seed = (self.config.seed * 1_000_003 + number * self.size + self.rank) % 2**31
        operations = train_operations(self.config)
        return self._folder.read(np.concatenate(parts), self.batch, operations, seed)


class MindSporeEvalBatches(EvalBatches):
    """``EvalBatches`` whose images are decoded and resized by MindSpore."""

    reads_ahead = True

    def __init__(self, images: ImageSet, config: Config, rank: int, size: int, batch: int) -> None:
        super().__init__(images, config, rank, size, batch)
        check_pipeline(config, training=False)
        self._folder = _Folder(images, config)

    def __getitem__(self, number: int) -> Batch:
        images, labels = self._folder.batch(number, self._rest)
        missing = self.batch - len(labels)
        padding = np.zeros((missing, *images.shape[1:]), np.uint8)
        return Batch(
            np.concatenate([images, padding]),
            np.concatenate([labels, np.full(missing, PADDING_LABEL, np.int32)]),
        )

    def _rest(self, number: int) -> _Batches:
        indices, operations = self.indices[number * self.batch :], eval_operations(self.config)
        return self._folder.read(indices, self.batch, operations, seed=0)


class _Folder:
    """The class folders of an ImageSet as an ImageFolderDataset.

    Raises:
        UserError: if the images are not in class folders, or MindSpore finds other files in them.
    """

    def __init__(self, images: ImageSet, config: Config) -> None:
        self._labels = images.labels.astype(np.int32)
        self._workers = config.num_parallel_workers or available_cores()
        if images.paths is None:
            raise UserError(
                "input_pipeline=mindspore reads class folders of image files; use "
                "--input_pipeline=own"
            )
        paths = [os.path.abspath(path) for path in images.paths]
        self._root = os.path.dirname(os.path.dirname(paths[0]))
        self._classes = {
            name: label
            for name, label in images.class_to_index.items()
            if os.path.isdir(os.path.join(self._root, name))
        }
        files = _files(self._root, self._classes)
        places = {file: place for place, file in enumerate(files)}
        for path, label in zip(paths, self._labels.tolist()):
            if path not in places or not path.lower().endswith(_DECODED):
                raise UserError(
                    f"input_pipeline=mindspore reads {', '.join(_DECODED)} directly in class "
                    f"folders, not {path}; use --input_pipeline=own"
                )
            if self._classes.get(os.path.basename(os.path.dirname(path))) != label:
                raise UserError(
                    f"input_pipeline=mindspore takes labels from folders, and {path} has another; "
                    "use --input_pipeline=own"
                )
        self._places = np.array([places[path] for path in paths])
        self._check_order(files)
        self._batches: _Batches = iter(())
        self._following = -1

    def batch(self, number: int, begin: Callable[[int], _Batches]) -> tuple[np.ndarray, np.ndarray]:
        """Batch ``number``: the next one, or the first that ``begin(number)`` yields."""
        found = next(self._batches, None) if number == self._following else None
        if found is None:
            self._batches = begin(number)
            found = next(self._batches)
        self._following = number + 1
        return found

    def read(
        self, indices: np.ndarray, batch: int, operations: Sequence[Any], seed: int
    ) -> _Batches:
        """(images (B, S, S, 3) uint8, labels (B,) int32) of ``indices``, in their order."""
        ds.config.set_seed(seed)
        dataset = self._open(self._places[indices].tolist())
        dataset = dataset.map(list(operations), "image", num_parallel_workers=self._workers)
        dataset = dataset.batch(batch, num_parallel_workers=self._workers)
        rows = dataset.create_tuple_iterator(num_epochs=1, output_numpy=True)
        for pixels, labels in _reported(rows):
            yield pixels, labels.astype(np.int32)

    def _open(self, places: list[int]) -> ds.Dataset:
        return ds.ImageFolderDataset(
            self._root,
            num_parallel_workers=self._workers,
            class_indexing=self._classes,
            sampler=ds.SubsetSampler(places),
        )

    def _check_order(self, files: Sequence[str]) -> None:
        """Compare some files: MindSpore gives no names, only places in its own order."""
        chosen = np.linspace(0, len(self._places) - 1, _COMPARED_FILES).astype(int)
        places = np.unique(self._places[chosen]).tolist()
        rows = self._open(places).create_dict_iterator(num_epochs=1, output_numpy=True)
        for place, row in zip(places, _reported(rows), strict=True):
            if row["image"].tobytes() != Path(files[place]).read_bytes():
                raise UserError(
                    f"input_pipeline=mindspore finds other files in {self._root} than this "
                    "program; use --input_pipeline=own"
                )


def _reported(rows: Iterable[Any]) -> Iterator[Any]:
    """The rows of MindSpore's pipeline; its errors become UserErrors."""
    try:
        yield from rows
    except RuntimeError as failure:
        raise UserError(f"input_pipeline=mindspore: {_reason(failure)}") from None


def _files(root: str, classes: Iterable[str]) -> list[str]:
    """The image files of class folders in MindSpore's order: by class, then by path."""
    return [
        str(path)
        for name in sorted(classes)
        for path in sorted(Path(root, name).iterdir())
        if path.suffix.lower() in _EXTENSIONS
    ]


def _reason(failure: RuntimeError) -> str:
    """The line of MindSpore's message that says what is wrong."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip(" -")]
    marked = [line.removeprefix("[ERROR]").strip() for line in lines if line.startswith("[ERROR]")]
    return (marked or lines or ["failed"])[0]
