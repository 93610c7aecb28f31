"""See a data set as the network will, and what seems wrong with it:

    python3 scripts/preview_dataset.py --data_path=DIR [--config_path=RECIPE] [--result_path=outputs/preview.png] [--num_parallel_workers=N]

DIR as in train.py; with --pretrained=FILE preprocessing is that of the weights. Draws training images with their augmented forms,
validation images with their crops and a histogram of the classes; prints what looks wrong: classes of very different size, the same image
twice or in both parts, tiny, huge and unreadable ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.command import run_main  # noqa: E402


def main(arguments):
    from src.utils.config import load_config, parse_only_flags
    from src.utils.device import available_cores, prepare_process
    from src.utils.files import check_ending

    flags = parse_only_flags(arguments)
    config = load_config(flags)
    check_ending("result_path", config.result_path, (".png",))
    prepare_process()
    if config.checkpoint_file_path:
        from src.training.pretrained import read_pretrained
        config = read_pretrained(config.checkpoint_file_path).configure(flags, config)
    from src.dataset.checking import summary
    from src.dataset.preview import draw, look_at, suspicions
    from src.dataset.sources import open_images, split_share, validation_path
    from src.parallel.long_task import LongTask

    sets = {"train": open_images(config.data_path, "train", config.dataset_format)}
    share, beside = split_share(config), config.eval_data_path or validation_path(config.data_path)
    if share:
        sets["train"], sets["val"] = sets["train"].split(share, config.seed)
    elif beside:
        sets["val"] = open_images(beside, "val", config.dataset_format, sets["train"].class_to_index)
    looks = {}
    for part, images in sets.items():
        print(f"{part}: {summary(images)}", flush=True)
        with LongTask("looked at", len(images), "image") as task:
            looks[part] = look_at(images, config.num_parallel_workers or available_cores(), task.advance)
    found = suspicions(sets, looks, config)
    for line in found:
        print(f"look: {line}")
    target = config.result_path or "outputs/preview.png"
    draw(sets, config, target)
    print(f"preview_dataset: to look at: {len(found)}, pictures in {target}", flush=True)


if __name__ == "__main__":
    run_main(main, takes_keys=True)
