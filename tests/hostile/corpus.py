"""Public collections of odd pictures and names, checked as tests/hostile draws its own:

    python3 tests/hostile/corpus.py --pictures=DIR [--names=blns.json]

Every picture below DIR is decoded as Pillow shows it, or refused, or said to be damaged. Good
collections are the test images of Pillow, libvips, image-rs and image-tiff, stb's PngSuite,
libavif, and the exif-samples of ianare. Every string of the JSON list, such as the Big List of
Naughty Strings (github.com/minimaxir/big-list-of-naughty-strings), is the name of a class.

Prints a line for each failure, then the numbers. The exit status is 1 if anything failed.
"""

import argparse
import collections
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile.pictures import check_damaged  # noqa: E402

from src.dataset.class_folders import EXTENSIONS, is_litter  # noqa: E402
from src.dataset.sources import open_images  # noqa: E402

_LONGEST_NAME = 240


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--names", type=Path)
    options = parser.parse_args()
    files = sorted(
        file
        for file in options.pictures.rglob("*")
        if file.suffix.lower() in EXTENSIONS and file.is_file() and file.stat().st_size
    )
    counts = collections.Counter()
    with ProcessPoolExecutor() as pool:
        for file, outcome in zip(files, pool.map(look, files)):
            counts[outcome if outcome in ("shown", "refused") else "failed"] += 1
            if outcome not in ("shown", "refused"):
                print(f"FAILED {file}: {outcome}")
    print("corpus pictures", *(f"{name}={counts[name]}" for name in ("shown", "refused", "failed")))
    failed = counts["failed"]
    if options.names is not None:
        failed += check_names(json.loads(options.names.read_text()))
    sys.exit(failed > 0)


def look(file):
    """What became of a picture: shown, refused, or what is wrong."""
    try:
        return "shown" if check_damaged(file.read_bytes()) else "refused"
    except Exception as failure:
        return f"{type(failure).__name__} {failure}"


def check_names(strings):
    """How many strings, as names of class folders, are not classes or not told to be left out."""
    possible = {text.replace("/", "_").replace("\0", "") for text in strings} - {"", ".", ".."}
    names = {name for name in possible if len(name.encode()) <= _LONGEST_NAME}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).mkdir()
            Image.new("RGB", (4, 4)).save(Path(folder) / name / "a.png")
        images = open_images(folder, "train")
        told = {Path(path).name for path in images.left_out}
    wrong = [name for name in names if (name in images.class_to_index) == is_litter(name)]
    wrong += [name for name in names if is_litter(name) and name not in told]
    for name in wrong:
        print(f"FAILED the class {name!r}")
    print(f"corpus names={len(names)} left_out={len(told)} failed={len(wrong)}")
    return len(wrong)


if __name__ == "__main__":
    main()
