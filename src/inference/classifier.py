"""A trained network for use from Python: photos in, classes out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from scipy.special import softmax

from src.dataset.decoding import BadImage, picture_pixels, read_image, warn_of_damage
from src.dataset.image_set import class_names
from src.dataset.transforms import eval_min_side, eval_transform
from src.distributed.communicator import Communicator
from src.inference.backends import Backend, OpenedModel, open_backend
from src.inference.evaluation import EvalData, undecodable_message
from src.inference.metrics import count_nonfinite, nonfinite_message
from src.inference.prediction import Prediction, find_images
from src.kernels.library import KernelChoice
from src.utils.errors import UserError
from src.utils.log import refuse_warnings
from src.utils.progress import print_status

# A file, a Pillow image, or (H, W, 3) uint8 RGB.
Photo: TypeAlias = str | Path | Image.Image | np.ndarray
_PHOTO = "a file, a Pillow image, or an (H, W, 3) uint8 array, RGB"
_ONE_PHOTO = (str, Path, Image.Image, np.ndarray)
# One graph is compiled for this many images, and one for a single image.
_BATCH = 16


class Classifier:
    """A checkpoint or an exported file that is ready to classify. Threads may share one.

    Args:
        path: the file.
        flags: {key: value as on the command line}; they win over what the file records.
        kernels: what convolutions are computed with on CPU.

    Attributes:
        config: the configuration of its network and preprocessing.
        class_names: names of its classes, in the order of the network's outputs.

    Raises:
        UserError: if the file cannot be read or does not fit.
    """

    # MindSpore does not compute for two threads at once, not even two networks.
    _computing = Lock()

    def __init__(self, path: Path, flags: Mapping[str, str], kernels: KernelChoice) -> None:
        self.path, self._flags, self._kernels = path, dict(flags), kernels
        self._opened = self._open(flags)
        self.config = self._opened.model.config
        self._log = refuse_warnings(print_status) if self.config.strict else print_status
        for note in self._opened.model.prediction_notes:
            self._log(note)
        classes = self._opened.model.class_to_index or {}
        self.class_names = class_names(classes, self.config.num_classes)

    def predict(self, photos: Photo | Sequence[Photo]) -> Any:
        """Classify photos as predict.py does.

        Args:
            photos: a photo, for one ``Prediction``; or a folder, or a sequence of photos and
                folders, for a list of them. A folder's are in the order of their names.

        Raises:
            UserError: if a photo cannot be decoded, or the network's outputs are not finite.
        """
        if isinstance(photos, _ONE_PHOTO) and not _is_folder(photos):
            return self.predict([photos])[0]
        listed = _expanded(photos)
        probabilities = softmax(self.logits(listed).astype(np.float64), axis=1)
        names = [str(photo) if isinstance(photo, (str, Path)) else "" for photo in listed]
        return [Prediction.of(*pair, self._opened.model) for pair in zip(names, probabilities)]

    def logits(self, photos: Photo | Sequence[Photo]) -> np.ndarray:
        """The network's outputs for N photos: (N, num_classes) float32; N is 1 for a photo.

        Raises:
            UserError: if a photo cannot be decoded, or the outputs are not finite.
        """
        photos = _expanded(photos)
        if not photos:
            return np.empty((0, self.config.num_classes), np.float32)
        parts = []
        for start in range(0, len(photos), _BATCH):
            images = np.stack([self._prepared(photo) for photo in photos[start : start + _BATCH]])
            count = len(images)
            size = 1 if len(photos) == 1 else _BATCH
            filled = np.concatenate([images, np.zeros((size - count, *images.shape[1:]), np.uint8)])
            parts.append(self._opened.classify(filled)[:count])
        logits = np.concatenate(parts)
        if nonfinite := count_nonfinite(logits):
            raise UserError(nonfinite_message(nonfinite, len(logits)))
        return logits

    def evaluate(self, data_path: str | Path = "") -> dict[str, Any]:
        """Evaluate as eval.py does; the result has the names and values of its result file.

        Args:
            data_path: images in class folders, or what else --data_path takes; "": the validation
                images that the file records.

        Raises:
            UserError: if there are no images, or they do not fit the network.
        """
        flags = {**self._flags, **({"data_path": str(data_path)} if data_path else {})}
        opened = self._open(flags)
        data = EvalData(opened, Communicator(), self._log)
        data.say_whether_seen(opened, "")
        result = data.evaluate(opened)
        if result.nonfinite:
            raise UserError(nonfinite_message(result.nonfinite, result.images))
        if result.undecodable:
            self._log(undecodable_message(result))
        return data.values(self.path, opened, result)

    def _open(self, flags: Mapping[str, Any]) -> OpenedModel:
        with self._computing:
            opened = open_backend(self.path, flags, self._kernels)
        return replace(opened, backend=partial(self._compute, opened.backend))

    def _compute(self, backend: Backend, images: np.ndarray) -> np.ndarray:
        with self._computing:
            return backend(images)

    def _prepared(self, photo: Photo) -> np.ndarray:
        """The network's input for a photo: (image_size, image_size, 3) uint8."""
        config = self.config
        if isinstance(photo, (str, Path)):
            report = _refuse_damage if config.strict else warn_of_damage
            pixels = read_image(str(photo), config.max_pixels, eval_min_side(config), report)
        elif isinstance(photo, Image.Image):
            pixels = picture_pixels(photo)
        else:
            pixels = np.ascontiguousarray(photo)
            shape = pixels.shape
            if pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or not pixels.size:
                raise UserError(
                    f"a photo is {_PHOTO}; got {type(photo).__name__} {pixels.dtype} {shape}"
                )
        return eval_transform(pixels, config)


def _refuse_damage(message: str) -> None:
    raise BadImage(message)


def _is_folder(photo: Photo) -> bool:
    return isinstance(photo, (str, Path)) and Path(photo).is_dir()


def _expanded(photos: Photo | Sequence[Photo]) -> list[Photo]:
    """Single photos, with those of a folder where the folder is."""
    if not isinstance(photos, (*_ONE_PHOTO, Iterable)):
        raise UserError(f"a photo is {_PHOTO}; got {type(photos).__name__}")
    expanded: list[Photo] = []
    for photo in [photos] if isinstance(photos, _ONE_PHOTO) else photos:
        expanded += find_images([str(photo)], print_status) if _is_folder(photo) else [photo]
    return expanded
