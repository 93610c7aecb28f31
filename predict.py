"""Classify images: `python3 predict.py --checkpoint_file_path=FILE IMAGE_OR_FOLDER... [--result_path=FILE.json] [--save_figure=FILE.png]`.

Takes checkpoints and exported files (.ckpt, .safetensors, .pth, .hdf5, .onnx, .mindir) and prints the five likeliest classes (--top_k).
A .txt file is a list of images, a line each, and - such a list on standard input. Results go to a .json, .jsonl or .csv file.
"""

from src.command import begin, run_main


def main(arguments: list[str]) -> None:
    command = begin(arguments, names="--checkpoint_file_path=FILE IMAGE_OR_FOLDER", distributed=False)
    config = command.config
    from src.parallel.long_task import note
    if config.checkpoint_file_path:
        note(f"loading {config.checkpoint_file_path}")
    from src.inference.engines import open_engine
    from src.inference.prediction import as_table, contact_sheet, find_images, predict, write_predictions
    from src.runs.checkpoint import choose_checkpoint
    from src.utils.errors import Incomplete
    from src.utils.files import check_ending
    from src.utils.log import create_log

    check_ending("result_path", config.result_path, (".json", ".jsonl", ".csv"))
    check_ending("save_figure", config.save_figure, (".png",))
    paths = find_images(command.names)
    command.select_device()
    model, engine, _ = open_engine(choose_checkpoint(config.checkpoint_file_path, note), command.flags)
    predictions, bad = predict(paths, model, engine)
    log = create_log()
    for message in bad:
        log(f"left out: {message}")
    if config.result_path:
        write_predictions(config.result_path, predictions)
        log(f"results in {config.result_path}")
    else:
        log(as_table(predictions))
    if config.save_figure:
        contact_sheet(predictions, config.save_figure)
        log(f"figure in {config.save_figure}")
    if bad:
        raise Incomplete(f"{len(bad)} of {len(paths)} images could not be read, the first: {bad[0]}")


if __name__ == "__main__":
    run_main(main, takes_keys=True)
