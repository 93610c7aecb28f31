"""Make a page about runs: `python3 report.py RUN_FOLDER... [--result_path=FILE.html] [--data_path=DIR]`.

One self-contained HTML file, by default report.html in the first folder: configuration and what differs between the runs, curves, accuracy
by class, confusion, the worst mistakes of best.ckpt, augmented images, where the time went. It needs no network and no script.
"""

from typing import TYPE_CHECKING

from src.command import begin, run_main

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from src.runs.report import RunReport
    from src.runs.run_folder import RunFolder

_PICTURES = 24


def main(arguments: list[str]) -> None:
    command = begin(arguments, names="RUN_FOLDER", distributed=False)
    from functools import partial
    from pathlib import Path

    from src.runs.report import render
    from src.runs.run_folder import RunFolder
    from src.utils.files import check_ending, write_whole
    from src.utils.log import create_log

    check_ending("result_path", command.config.result_path, (".html", ".htm"))
    log = create_log()
    folders = [RunFolder(Path(name)) for name in command.names]
    command.select_device()
    short = [folder.path.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else list(command.names)
    page = render([report_of(name, folder, command.flags, log) for name, folder in zip(names, folders)])
    target = command.config.result_path or str(folders[0].report)
    # Names may have bytes that are no text.
    write_whole(target, partial(Path.write_bytes, data=page.encode("utf-8", "backslashreplace")))
    log(f"report in {target}")


def report_of(name: str, folder: "RunFolder", flags: "Mapping[str, str]", log: "Callable[[str], None]") -> "RunReport":
    """What a run folder holds, and what its best network (else its latest) says of the validation images, if they are still there.

    Raises:
        UserError: if it is no folder of a run.
    """
    from dataclasses import replace

    from src.dataset.image_set import class_names
    from src.dataset.sources import validation_path
    from src.inference.engines import open_engine
    from src.inference.mistakes import augmented, judge, most_confused, thumbnail
    from src.runs.report import Picture, RunReport
    from src.utils.config import DEFAULT_CONFIG, read_layer, validated
    from src.utils.errors import UserError

    if not folder.path.is_dir():
        raise UserError(f"the folder '{folder.path}' does not exist")
    metrics = folder.read_metrics()
    if not metrics:
        raise UserError(f"'{folder.path}' is no folder of a run that has finished an epoch: it has no lines in metrics.jsonl")
    if "data_path" in flags:
        # Where the training images lie now, the validation images as they were beside or among them.
        beside = validation_path(flags["data_path"]) or ""
        flags = {"val_split": folder.read_config()["val_split"], "eval_data_path": beside, **flags}
    report = RunReport(name, folder.read_config(), folder.read_environment(), metrics,
                       defaults=validated(read_layer(DEFAULT_CONFIG)).model_dump(mode="json"))
    try:
        model, engine, _ = open_engine(folder.best if folder.best.exists() else folder.latest, flags)
        classes = class_names(model.class_to_index, model.config.num_classes)
        report = replace(report, classes=classes)
        images = model.open_images()
        judgement = judge(images, engine, model.config, log)
        confusion = judgement.confusion(model.config.num_classes)
        mistakes = [Picture(thumbnail(images.load(int(judgement.indices[at]))),
                            f"{classes[judgement.labels[at]]}, taken for {classes[judgement.predicted[at]]} "
                            f"({100 * judgement.probability[at]:.0f} %, right one {100 * judgement.probability_of_label[at]:.0f} %)")
                    for at in judgement.worst(_PICTURES)]
        report = replace(report, confusion=confusion.tolist(), confused=most_confused(confusion, 10), mistakes=mistakes)
        training = augmented(model.open_training_images(), validated(report.config), _PICTURES)
        samples = [Picture(thumbnail(image), classes[label]) for image, label in training]
        return replace(report, samples=samples)
    except UserError as failure:
        log(f"{name}: without all pictures: {failure}")
        return replace(report, missing=f"Not everything could be shown: {failure}.")


if __name__ == "__main__":
    run_main(main, takes_keys=True)
