"""Pack a data set into a few large files to train from: `--data_path=FILE.safetensors`.

    python3 scripts/pack_dataset.py --data_path=DIR --result_path=train.safetensors
        [--split=train|val] [--short_side=256] [--quality=90] [--num_parallel_workers=N]

DIR is as in train.py. --short_side=0, the default, keeps every file's bytes. Start it again after
an interruption to continue. train.safetensors and val.safetensors in one folder are found as
training and validation images.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli.run import run_process  # noqa: E402
from src.distributed.launcher import single_process_warning  # noqa: E402
from src.utils.errors import UserError  # noqa: E402


def main(arguments):
    from src.dataset.packed import ENDING, pack
    from src.dataset.sources import open_images
    from src.dataset.splits import set_messages, validation_path
    from src.utils.device import prepare_process
    from src.utils.files import check_ending
    from src.utils.machine import available_cores

    options = parse(arguments)
    if warning := single_process_warning("pack_dataset"):
        print(warning)
    prepare_process()
    from src.utils.progress import ProgressBar

    check_ending("result_path", options.result_path, [ENDING])
    classes = None
    if options.split == "val" and has_both(options.data_path):
        classes = open_images(options.data_path, "train").class_to_index
    images = open_images(options.data_path, options.split, class_to_index=classes)
    others = validation_path(options.data_path)
    if options.split == "val" and others not in (None, options.data_path):
        raise UserError(
            f"the validation images of '{options.data_path}' are {others}: pass "
            f"--data_path={others}"
        )
    if images.paths is None:
        raise UserError(
            f"the images of '{options.data_path}' are not separate files, so there is nothing to "
            "pack"
        )
    for line in set_messages(images, "training" if options.split == "train" else "validation"):
        print(line)
    started = time.perf_counter()
    with ProgressBar("packed", len(images), "image") as task:
        pack(
            images,
            options.result_path,
            options.short_side,
            options.quality,
            options.num_parallel_workers or available_cores(),
            task.advance,
        )
    print(
        f"packed {len(images)} images of {images.num_classes} classes into {options.result_path}, "
        "verified; "
        f"{len(images) / (time.perf_counter() - started):.0f} images/s"
    )


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--result_path", required=True)
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--short_side", type=int, default=0)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--num_parallel_workers", type=int, default=0)
    options = parser.parse_args(arguments)
    if (
        options.short_side < 0
        or not 1 <= options.quality <= 100
        or options.num_parallel_workers < 0
    ):
        fail("--short_side and --num_parallel_workers must be 0 or more, --quality 1 to 100")
    return options


def has_both(data_path):
    """Whether ``data_path`` is a root that holds a training part too."""
    from src.dataset.class_folders import find_part

    path = Path(data_path)
    is_list_root = (path / "train_list.txt").exists()
    return data_path == "digits" or is_list_root or find_part(path, "train") is not None


def fail(message):
    raise UserError(message)


if __name__ == "__main__":
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
    else:
        run_process(lambda signals: main(sys.argv[1:]))
