"""Random hostile environments, reproducible by seed.

They use commands, files, names, formats, times, streams and limits as a hostile or careless user
would.

A world is a shell command in a folder of its own, made by one of the functions of ``KINDS`` from a
random generator. ``invariants`` checks what must hold for all of them. The kinds of ``PROPERTIES``
need no command: they are functions that raise AssertionError if what must hold does not.
"""

import json
import os
import random
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from hostile.layouts import check_layout, draw_layout
from hostile.pictures import check_damaged, check_whole, damage, draw_picture
from hostile.weight_files import check_weight_file, draw_weight_file

from src.cli.config import Config
from src.cli.flags import ALIASES

TINY = [
    "--network=cifar_quick",
    "--image_size=32",
    "--train_crop=padded",
    "--per_batch_size=4",
    "--lr=0.01",
]
VALUES = [
    "",
    "0",
    "1",
    "-1",
    "nan",
    "inf",
    "1e999",
    "1e-30",
    "true",
    "null",
    "[]",
    "[1,2",
    "a b",
    "é",
    "\u202e",
    "$HOME",
    "'",
    "x" * 5000,
    "0.5,0.5,0.5",
    "99999999999999999999",
    "/",
    "/dev/null",
    "/dev/full",
    "..",
    "none",
    "O3",
    "GPU",
    "adamw(",
    "mixup()",
    "--lr",
]
NAMES = [
    b"a",
    b"na\xffme",
    "žluť".encode(),
    b"$x",
    b"new\nline",
    b" lead",
    b"-dash",
    b"a" * 200,
    b"%s",
    "\u202eabc".encode(),
    b"CON",
    b".hidden",
]
BYTES = [
    b"",
    b"text",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\0\0\0\0WEBP",
    b"BM" + b"\xff" * 40,
    b"P6 1 1 255 ",
    b"\0" * 4000,
]


@dataclass
class World:
    """A command to run with ``bash -c`` in ``folder``; the outputs that must be whole or absent.

    A signal at a moment, or none.
    """

    kind: str
    folder: Path
    command: str
    outputs: list[str] = field(default_factory=list)
    signal_after: tuple[int, float] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    streams_closed: bool = False


def words(*parts: object) -> str:
    """Words of a command, quoted for the shell."""
    return shlex.join(os.fsdecode(part) if isinstance(part, bytes) else str(part) for part in parts)


def picture(draw: random.Random, suffix: str) -> bytes:
    """An image file, whole or damaged in one of many ways."""
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(
        0, 256, (draw.randint(1, 40), draw.randint(1, 40), 3), np.uint8
    )
    encoded = cv2.imencode(suffix, pixels)[1].tobytes()
    damage = draw.randrange(8)
    if damage == 0:
        return draw.choice(BYTES)
    if damage == 1:
        return encoded[: draw.randrange(len(encoded))]
    if damage == 2:
        content = bytearray(encoded)
        for _ in range(draw.randint(1, 20)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        return bytes(content)
    return encoded + (b"trailing" if damage == 3 else b"")


def image_folder(draw: random.Random, root: Path, hostile: bool = True) -> Path:
    """Two to four class folders with images, names and contents drawn."""
    for label in range(draw.randint(2, 4)):
        name = (
            draw.choice(NAMES) + b"%d" % label
            if hostile and draw.random() < 0.4
            else b"class%d" % label
        )
        folder = os.path.join(os.fsencode(root), name)
        os.makedirs(folder, exist_ok=True)
        for number in range(draw.randint(0 if hostile else 4, 6)):
            suffix = draw.choice([".jpg", ".png", ".bmp", ".webp"])
            file = os.path.join(
                folder,
                (draw.choice(NAMES) if hostile and draw.random() < 0.2 else b"")
                + b"%d" % number
                + suffix.encode(),
            )
            what = draw.random() if hostile else 1
            if what < 0.02:
                os.mkfifo(file)
            elif what < 0.04:
                os.symlink(b"/nowhere", file)
            elif what < 0.06:
                os.makedirs(file)
            else:
                content = (
                    picture(draw, suffix)
                    if hostile
                    else cv2.imencode(suffix, np.full((9, 9, 3), 60 * label, np.uint8))[1].tobytes()
                )
                Path(os.fsdecode(file)).write_bytes(content)
    return root


def any_flag(draw: random.Random) -> str:
    name = draw.choice([*Config.model_fields, *ALIASES, "config_path", "lrr", "", "-"])
    return f"--{name}" if draw.random() < 0.1 else f"--{name}={draw.choice(VALUES)}"


def train(folder: Path, data: object, *more: object) -> str:
    return words(
        "python3",
        "train.py",
        f"--data_path={data}",
        f"--output_path={folder}/out",
        *TINY,
        "--max_steps=2",
        *more,
    )


def flags(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    chosen = [any_flag(draw) for _ in range(draw.randint(1, 3))]
    # A whole training or an evaluation of ImageNet's size would prove nothing and take minutes.
    end = ["--max_steps=1", "--image_size=32"] if draw.random() < 0.9 else ["--max_steps=1"]
    command = draw.choice(
        [
            words(
                "python3",
                "train.py",
                f"--data_path={good['data']}",
                f"--output_path={folder}/out",
                *TINY,
                *chosen,
                *end,
            ),
            words(
                "python3",
                "eval.py",
                f"--data_path={good['data']}",
                f"--checkpoint_file_path={good['checkpoint']}",
                *chosen,
            ),
            words(
                "python3",
                "export.py",
                f"--checkpoint_file_path={good['checkpoint']}",
                f"--result_path={folder}/x.ckpt",
                *chosen,
            ),
            words(
                "python3",
                "predict.py",
                f"--checkpoint_file_path={good['checkpoint']}",
                good["image"],
                *chosen,
            ),
            words(
                "python3",
                "scripts/launch.py",
                *chosen,
                "train.py",
                f"--output_path={folder}/out",
                "--max_steps=1",
            ),
        ]
    )
    return World("flags", folder, command)


def files(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    data = image_folder(draw, folder / "data")
    result = f"{folder}/r.json"
    command = draw.choice(
        [
            train(folder, data, f"--bad_samples={draw.choice(['error', 'replace'])}"),
            words(
                "python3",
                "eval.py",
                f"--data_path={data}",
                f"--checkpoint_file_path={good['checkpoint']}",
                f"--result_path={result}",
            ),
            words(
                "python3",
                "predict.py",
                f"--checkpoint_file_path={good['checkpoint']}",
                data,
                f"--result_path={result}",
            ),
            words(
                "python3",
                "scripts/check_dataset.py",
                f"--data_path={data}",
                f"--result_path={result}",
            ),
            words(
                "python3",
                "scripts/pack_dataset.py",
                f"--data_path={data}",
                f"--result_path={folder}/p.safetensors",
            ),
        ]
    )
    return World("files", folder, command, [result])


def lists(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    data = image_folder(draw, folder / "data", hostile=False)
    found = sorted(data.rglob("*.*"))
    lines = [f"{file.relative_to(data)} {file.parent.name[-1]}" for file in found] * 2
    for _ in range(draw.randint(0, 3)):
        lines[draw.randrange(len(lines))] = draw.choice(
            [
                "",
                "x",
                "../../etc/passwd 0",
                "a.jpg -1",
                "a.jpg 1 1",
                f"{found[0]} 0",
                "\0 0",
                "a.jpg ٣",
                f"{found[0].relative_to(data)} {draw.randint(0, 9)}",
                f"{'y' * 300}.jpg 99999999",
            ]
        )
    encoded = "\n".join(lines).encode()
    (data / "train_list.txt").write_bytes(encoded if draw.random() < 0.9 else encoded + b"\xff\xfe")
    return World("lists", folder, train(folder, draw.choice([data, data / "train_list.txt"])))


def checkpoints(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    content = bytearray(good["checkpoint"].read_bytes())
    damage = draw.randrange(4)
    if damage == 0:
        content = content[: draw.randrange(len(content))]
    elif damage == 1:
        for _ in range(draw.randint(1, 50)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif damage == 2:
        content = bytearray(draw.choice(BYTES))
    file = folder / draw.choice(["a.ckpt", "a.pth", "a.safetensors", "a.hdf5", "a.onnx", "a"])
    file.write_bytes(content)
    result = f"{folder}/r.json"
    command = draw.choice(
        [
            words(
                "python3",
                "eval.py",
                f"--data_path={good['data']}",
                f"--checkpoint_file_path={file}",
                f"--result_path={result}",
            ),
            words(
                "python3",
                "predict.py",
                f"--checkpoint_file_path={file}",
                good["image"],
                f"--result_path={result}",
            ),
            words(
                "python3",
                "export.py",
                f"--checkpoint_file_path={file}",
                f"--result_path={folder}/out.ckpt",
            ),
            train(folder, good["data"], f"--checkpoint_file_path={file}"),
            train(folder, good["data"], f"--resume={file}"),
        ]
    )
    return World("checkpoints", folder, command, [result])


def recipes(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    lines = [
        f"{draw.choice([*Config.model_fields, 'extends', 'unknown'])}: {draw.choice(VALUES)[:100]}"
        for _ in range(draw.randint(1, 4))
    ]
    (folder / "r.yaml").write_text(
        "\n".join(lines) + draw.choice(["", "\n\t- x", "\n&a [*a]", "\n? "]), encoding="utf-8"
    )
    return World("recipes", folder, train(folder, good["data"], f"--config_path={folder}/r.yaml"))


def streams(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    closed = " ".join(
        draw.sample(
            ["<&-", ">&-", "2>&-", ">/dev/full", "2>/dev/full", "| head -c 20 >/dev/null"],
            draw.randint(1, 2),
        )
    )
    environment = draw.choice(
        [
            {},
            {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"},
            {"PYTHONUTF8": "0", "LANG": "C"},
            {"TERM": "dumb"},
        ]
    )
    data = image_folder(draw, folder / "data", hostile=False)
    result = f"{folder}/r.json"
    command = draw.choice(
        [
            train(folder, data),
            words(
                "python3",
                "predict.py",
                f"--checkpoint_file_path={good['checkpoint']}",
                data,
                f"--result_path={result}",
            ),
            words("python3", "train.py", "--lr=fast"),
        ]
    )
    return World(
        "streams",
        folder,
        f"set -o pipefail; {command} {closed}",
        [result],
        environment=environment,
        streams_closed=True,
    )


def signals(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    command = train(
        folder, good["data"], "--max_steps=0", "--max_epoch=100000", "--ckpt_interval_steps=50"
    )
    start = draw.choice(["exec ", "exec ", "exec python3 scripts/launch.py --nproc_per_node=2 "])
    command = start + (command if start == "exec " else command.removeprefix("python3 "))
    return World(
        "signals",
        folder,
        command,
        signal_after=(draw.choice([2, 9, 10, 15]), draw.uniform(0.05, 6)),
    )


def limits(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    limit = draw.choice(
        [
            f"ulimit -f {draw.choice([1, 4, 50, 300])}; exec",
            f"ulimit -n {draw.choice([16, 32, 64])}; exec",
            "ulimit -u 4000; exec",
            f"ulimit -v {draw.randint(200, 6000) * 1024}; exec",
        ]
        + [_full_disk(draw, folder)] * 2 * (os.geteuid() == 0)
    )
    result = f"{folder}/r.json"
    command = draw.choice(
        [
            train(folder, good["data"], "--run_eval=1", f"--eval_data_path={good['data']}"),
            words(
                "python3",
                "eval.py",
                f"--data_path={good['data']}",
                f"--checkpoint_file_path={good['checkpoint']}",
                f"--result_path={result}",
            ),
            words(
                "python3",
                "export.py",
                f"--checkpoint_file_path={good['checkpoint']}",
                f"--result_path={folder}/x.safetensors",
                "--file_format=SAFETENSORS",
            ),
        ]
    )
    return World("limits", folder, f"{limit} {command}", [result])


def _full_disk(draw: random.Random, folder: Path) -> str:
    """What runs the rest of a command with few KB left on the disk that it writes to."""
    mount = words("mount", "-t", "tmpfs", "-o", f"size={draw.randint(1, 600)}k", "tmpfs", folder)
    return f"exec unshare --mount bash -c '{mount} && exec \"$@\"' bash"


def clocks(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    """A clock that jumps by up to a year, and a disk that is slow now and then."""
    command = draw.choice(
        [
            train(folder, good["data"], "--run_eval=1", f"--eval_data_path={good['data']}"),
            f"mpirun -n 2 --map-by :OVERSUBSCRIBE {train(folder, good['data'], '--max_steps=3')}",
        ]
    )
    return World(
        "clocks",
        folder,
        f"{command} && exec {command} --resume=auto --max_steps=8",
        environment={
            "LD_PRELOAD": str(good["machine"]),
            "MACHINE_SEED": str(draw.randrange(10**6)),
            "MACHINE_SLOW_MS": str(draw.choice([0, 0, 20])),
        },
    )


def ranks(draw: random.Random, folder: Path, good: dict[str, Path]) -> World:
    sides = []
    for _ in range(2):
        chosen = [any_flag(draw)] if draw.random() < 0.5 else []
        sides.append(
            "-n 1 "
            + train(
                folder,
                good["data"],
                "--stall_timeout_s=20",
                *chosen,
                "--max_steps=2",
                "--max_epoch=1",
            )
        )
    return World("ranks", folder, f"exec mpirun --map-by :OVERSUBSCRIBE {' : '.join(sides)}")


# How often each is drawn.
KINDS: dict[Callable[[random.Random, Path, dict[str, Path]], World], int] = {
    flags: 10,
    files: 8,
    lists: 4,
    checkpoints: 6,
    recipes: 4,
    streams: 5,
    signals: 2,
    limits: 8,
    clocks: 2,
    ranks: 2,
}


def whole_pictures(random: np.random.Generator, folder: Path) -> None:
    drawn = draw_picture(random)
    if drawn is not None:
        check_whole(*drawn)


def damaged_pictures(random: np.random.Generator, folder: Path) -> None:
    drawn = draw_picture(random)
    if drawn is not None:
        check_damaged(damage(random, drawn[2]))


def weight_files(random: np.random.Generator, folder: Path) -> None:
    from conftest import randomise

    from src.models.create import create_model
    from src.models.networks import acnet_name

    network, target = create_model("cifar_quick", 5), create_model("cifar_quick", 5)
    randomise(network)
    state = {acnet_name(p.name, "cifar_quick"): p.asnumpy() for p in network.get_parameters()}
    folder.mkdir()
    check_weight_file(*draw_weight_file(random, state, folder), network, target)


def layouts(random: np.random.Generator, folder: Path) -> None:
    check_layout(folder, draw_layout(random, folder))


PROPERTIES = (whole_pictures, damaged_pictures, weight_files, layouts)


def draw_world(seed: int, number: int, folder: Path, good: dict[str, Path]) -> World:
    """World ``number`` of ``seed``, made in ``folder``.

    Args:
        good: a whole world to depart from: its data, an image of it, and a checkpoint trained on
            it.
    """
    draw = random.Random(f"{seed} {number}")
    kinds = {kind: often for kind, often in KINDS.items() if kind != clocks or good["machine"]}
    kind = draw.choices(list(kinds), list(kinds.values()))[0]
    return kind(draw, folder, good)


def invariants(world: World, status: int | None, out: str, err: str) -> list[str]:
    """The invariants that do not hold."""
    broken = []
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    if status is None:
        return ["it does not end"]
    for trace in (
        "Traceback (most recent",
        "--- Logging error",
        "Fatal Python error",
        "Segmentation fault",
    ):
        if trace in out + err:
            broken.append(f"a trace: {trace}")
    if status in (139, 134, -11, -6):
        broken.append(f"it crashed: status {status}")
    if status == 0 and errors:
        broken.append("it says error: and its status is 0")
    killed = world.signal_after is not None or status in (137, 141, 143)
    if status and not killed and not world.streams_closed:
        if not errors and "usage:" not in err and "check_dataset: " not in out:
            broken.append(f"status {status} without an error: line")
        if len(errors) > 1:
            broken.append(f"{len(errors)} error: lines")
        if any("ACNET_TRACEBACK" in line for line in errors):
            broken.append("it looks like a defect: " + errors[0][:200])
    for output in world.outputs:
        if Path(output).is_file():
            try:
                json.loads(
                    Path(output).read_text(),
                    parse_constant=lambda name: broken.append(f"{name} in JSON"),
                )
            except ValueError:
                broken.append(f"half a file: {output}")
    if status == 0:
        # A folder that is called nan is no wrong result.
        if re.search(r"(?<!/)\bnan\b(?!/)", out.lower()):
            broken.append("it prints nan and its status is 0")
        left = [str(file) for file in world.folder.rglob(".*partial*")]
        if left:
            broken.append(f"half-written: {left[0]}")
    return broken
