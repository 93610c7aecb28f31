"""--tensorboard=1."""

import json
import struct

import pytest
from conftest import TINY, execute, only_run

pytest.importorskip("tensorboardX")


def scalars(folder):
    """{(key, epoch): value} of the event files, as TensorBoard reads them.

    Records of length, checksum, event, checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            place += 16 + length
    return found


@pytest.mark.extended
def test_event_files_say_what_the_metrics_say(image_root, tmp_path):
    words = [
        "python3",
        "train.py",
        f"--data_path={image_root}/train",
        f"--output_path={tmp_path}",
        *TINY,
        "--run_eval=1",
        "--tensorboard=1",
        "--lr_scheduler=step",
    ]
    assert execute([*words, "--max_epoch=1"]).status == 0
    run = execute([*words, "--max_epoch=2", "--resume=auto"])
    assert run.status == 0, run
    folder = only_run(tmp_path)
    found = scalars(folder / "tensorboard")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {epoch for _, epoch in found if epoch} == {1, 2}
    for line in lines:
        for key in ("loss", "val_loss", "top1", "top5", "lr"):
            assert found[key, line["epoch"]] == pytest.approx(line[key], rel=1e-6), key
