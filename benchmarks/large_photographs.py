"""Images/s of training input from camera photographs, decoded whole and at a reduced scale:

    python3 benchmarks/large_photographs.py [--photographs=24] [--rounds=3] [--crop_scale=0.35]

The photographs have 24 megapixels, put together from pieces of those that scikit-image ships. Both
ways take turns on all cores. Also prints how much the images that the network sees differ, as a
mean over values of 0 to 255.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from photographs import find_photograph  # noqa: E402

from src.cli.recipes import load_config  # noqa: E402
from src.dataset.batches import TrainBatches  # noqa: E402
from src.dataset.sources import open_images  # noqa: E402

NAMES = ("astronaut", "chelsea", "coffee", "motorcycle_left", "retina", "rocket")
HEIGHT, WIDTH, PIECE = 4000, 6000, 300
BATCH = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photographs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crop_scale", type=float, default=0.35, help="least part of the area")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "class", options.photographs)
        images = open_images(folder, "train")
        batches = {
            kind: TrainBatches(images, settings(folder, kind, options.crop_scale), 0, 1)
            for kind in ("never", "train")
        }
        for number in range(options.rounds):
            report(number, batches)


def write_photographs(folder, count):
    """Write ``count`` JPEGs of pieces of photographs in their own size."""
    folder.mkdir()
    originals = [cv2.imread(str(find_photograph(name))) for name in NAMES]
    random = np.random.default_rng(0)
    for number in range(count):
        photograph = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        for top in range(0, HEIGHT, PIECE):
            for left in range(0, WIDTH, PIECE):
                original = originals[random.integers(len(originals))]
                y, x = (int(random.integers(side - PIECE + 1)) for side in original.shape[:2])
                part = photograph[top : top + PIECE, left : left + PIECE]
                part[:] = original[y : y + part.shape[0], x : x + part.shape[1]]
        cv2.imwrite(str(folder / f"{number}.jpg"), photograph, [cv2.IMWRITE_JPEG_QUALITY, 92])


def settings(folder, reduced_decoding, crop_scale):
    return load_config(
        {
            "data_path": folder,
            "network": "resnet18",
            "reduced_decoding": reduced_decoding,
            "crop_scale": [crop_scale, 1.0],
            "augmentations": ["crop"],
            "per_batch_size": BATCH,
        }
    )


def report(number, batches):
    seen, rates = {}, {}
    for kind, source in batches.items():
        started = time.perf_counter()
        seen[kind] = [source[index].images.astype(float) for index in range(source.per_epoch)]
        rates[kind] = source.per_epoch * BATCH / (time.perf_counter() - started)
    differences = [abs(a - b).mean() for a, b in zip(seen["never"], seen["train"])]
    print(
        f"large_photographs round={number} megapixels={HEIGHT * WIDTH / 1e6:.0f} "
        f"whole={rates['never']:.1f} reduced={rates['train']:.1f} images/s "
        f"ratio={rates['train'] / rates['never']:.2f} mean_difference={np.mean(differences):.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
