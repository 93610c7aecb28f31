"""Show a data set as the network will see it, and report likely problems:

    python3 scripts/preview_dataset.py --data_path=DIR [--config_path=RECIPE]
        [--result_path=FILE.png]

DIR is as in train.py; with --pretrained=FILE preprocessing is that of the weights. The picture
shows training images with their augmented forms, validation images with their crops, and a
histogram of the classes. Reports unbalanced classes, duplicates, images in both parts, and tiny,
huge and unreadable images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli.run import run  # noqa: E402


def main(command):
    from src.dataset.inspection import draw, find_problems, inspect_images, summary
    from src.dataset.splits import open_all_parts
    from src.utils.files import check_ending
    from src.utils.machine import available_cores
    from src.utils.progress import ProgressBar

    config = command.config
    check_ending("result_path", config.result_path, (".png",))
    if config.checkpoint_file_path:
        command.start_mindspore()
        from src.cli.recipes import load_config
        from src.training.start import read_pretrained

        settings = read_pretrained(config.checkpoint_file_path, command.flags).settings
        config = load_config(command.flags, pretrained_layer={**settings, "num_classes": 0})
    sets = open_all_parts(config)
    infos = {}
    for part, images in sets.items():
        print(f"{part}: {summary(images)}", flush=True)
        with ProgressBar("inspected", len(images), "image") as progress:
            workers = config.num_parallel_workers or available_cores()
            infos[part] = inspect_images(images, workers, progress.advance)
    problems = find_problems(sets, infos, config)
    for line in problems:
        print(f"look: {line}")
    target = config.result_path or "outputs/preview.png"
    draw(sets, config, target)
    print(f"preview_dataset: to look at: {len(problems)}, pictures in {target}", flush=True)


if __name__ == "__main__":
    run(main, __doc__)
