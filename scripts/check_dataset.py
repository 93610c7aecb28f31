"""Decode every image of a data set and list the files that cannot be, or only with warnings:

    python3 scripts/check_dataset.py --data_path=DIR [--num_parallel_workers=N] [--result_path=FILE.json]

DIR as in train.py; validation images beside it are checked too. The exit status is 1 where files are bad.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.command import run_main  # noqa: E402


def main(arguments):
    from src.utils.config import load_config, parse_only_flags
    from src.utils.device import available_cores, prepare_process

    config = load_config(parse_only_flags(arguments))
    prepare_process()
    from src.dataset.checking import check_files, image_sets, summary
    from src.dataset.sources import left_out_line
    from src.parallel.long_task import LongTask
    from src.utils.files import write_whole

    sets = image_sets(config.data_path, config.dataset_format)
    for part, images in sets.items():
        print(f"{part}: {summary(images)}")
        if line := left_out_line(images, part):
            print(line)
    paths = [path for images in sets.values() for path in images.paths or ()]
    started, findings = time.perf_counter(), []
    checked = check_files(paths, config.num_parallel_workers or available_cores())
    with LongTask("checked", len(paths), "image") as task:
        for finding in checked:
            task.advance()
            if finding is not None:
                findings.append(finding)
                task.write(f"{'BAD' if finding.bad else 'damaged'} {finding.path}: {finding.reason}")
    bad = sum(finding.bad for finding in findings)
    if config.result_path:
        text = json.dumps([vars(finding) for finding in findings], indent=1)
        write_whole(config.result_path, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"check_dataset: {len(paths)} images, {bad} cannot be decoded, {len(findings) - bad} damaged, "
          f"{len(paths) / (time.perf_counter() - started):.0f} images/s", flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_main(main)
