"""Classify images: `python3 predict.py --checkpoint_file_path=FILE IMAGE_OR_FOLDER...`.

Takes checkpoints and exported files (.ckpt, .safetensors, .pth, .hdf5, .onnx, .mindir) and prints
the five most likely classes (--top_k). A .txt file is a list of images, one per line; - reads such
a list from standard input. --result_path=FILE writes results as .json, .jsonl or .csv,
--save_figure=FILE.png a sheet of the images.
"""

from typing import TYPE_CHECKING

from src.cli.run import run
from src.utils.files import check_ending

if TYPE_CHECKING:
    from src.cli.command import Command


def main(command: "Command") -> None:
    # Wrong names of files are reported before the seconds that loading takes.
    check_ending("result_path", command.config.result_path, (".json", ".jsonl", ".csv"))
    check_ending("save_figure", command.config.save_figure, (".png",))
    if command.needs_mindspore:
        command.start_mindspore()
    from src.inference.prediction import predict

    predict(command)


if __name__ == "__main__":
    run(main, __doc__, positional="--checkpoint_file_path=FILE IMAGE_OR_FOLDER")
