"""A small classification set of real photographs, those that scikit-image ships.

Crops of each are a class.
"""

from importlib.util import find_spec
from pathlib import Path

from src.utils.errors import UserError

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "clock_motion",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "ihc",
    "moon",
    "motorcycle_left",
    "page",
    "retina",
    "rocket",
)
# Which part of a photograph's width, so that no pixel is in both.
_TRAIN, _VAL = (0.0, 0.7), (0.7, 1.0)


def find_photograph(name):
    """The file of a photograph.

    Raises:
        UserError: where scikit-image, which is not imported, is not installed.
    """
    package = find_spec("skimage")
    if package is None:
        raise UserError(
            "the photographs are scikit-image's: python3 -m pip install --no-deps scikit-image"
        )
    (file,) = (Path(package.origin).parent / "data").glob(f"{name}.*")
    return file


def write_crops(folder, names=PHOTOGRAPHS, train=60, val=20):
    """Write square crops: train/NAME/*.jpg from a photograph's left, val/NAME/*.jpg from its right.

    Returns ``folder``.

    Raises:
        UserError: where scikit-image, which is not imported, is not installed.
    """
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    for name in names:
        image = cv2.imread(str(find_photograph(name)))
        for part, (first, last), count in (("train", _TRAIN, train), ("val", _VAL, val)):
            region = image[:, int(first * image.shape[1]) : int(last * image.shape[1])]
            target = Path(folder) / part / name
            target.mkdir(parents=True)
            for number in range(count):
                side = int(random.integers(64, min(128, *region.shape[:2]) + 1))
                top, left = (
                    int(random.integers(0, length - side + 1)) for length in region.shape[:2]
                )
                cv2.imwrite(
                    str(target / f"{number}.jpg"),
                    cv2.resize(region[top : top + side, left : left + side], (96, 96)),
                )
    return Path(folder)
