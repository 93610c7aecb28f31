"""Decode every image of a data set, and list files that fail or decode only with warnings:

    python3 scripts/check_dataset.py --data_path=DIR [--num_parallel_workers=N] [--result_path=FILE]

DIR is as in train.py; validation images next to it are checked too. --result_path writes a JSON
file. The exit status is 1 if there are bad files.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli.run import run  # noqa: E402


def main(command):
    from src.dataset.inspection import check_files, check_has_files, summary
    from src.dataset.splits import open_all_parts, set_messages
    from src.utils.errors import PartialFailure
    from src.utils.files import write_atomically
    from src.utils.log import create_log
    from src.utils.machine import available_cores
    from src.utils.progress import ProgressBar

    config, log = command.config, command.checked(create_log())
    sets = open_all_parts(config)
    check_has_files(config.data_path, sets)
    for part, images in sets.items():
        log(f"{part}: {summary(images)}")
        for line in set_messages(images, part):
            log(line)
    paths = [path for images in sets.values() for path in images.paths or ()]
    started, findings = time.perf_counter(), []
    workers = config.num_parallel_workers or available_cores()
    checked = check_files(paths, workers, config.max_pixels)
    with ProgressBar("checked", len(paths), "image") as progress:
        for finding in checked:
            progress.advance()
            if finding is not None:
                findings.append(finding)
                kind = "BAD" if finding.bad else "damaged"
                progress.write(f"{kind} {finding.path}: {finding.reason}")
    bad = sum(finding.bad for finding in findings)
    if config.result_path:
        text = json.dumps([vars(finding) for finding in findings], indent=1)
        write_atomically(
            config.result_path, lambda partial: partial.write_text(text, encoding="utf-8")
        )
    rate = len(paths) / (time.perf_counter() - started)
    print(
        f"check_dataset: {len(paths)} images, {bad} cannot be decoded, "
        f"{len(findings) - bad} damaged, {rate:.0f} images/s",
        flush=True,
    )
    if bad:
        raise PartialFailure(f"{bad} of {len(paths)} images cannot be decoded")


if __name__ == "__main__":
    run(main, __doc__)
