"""Export a checkpoint: `python3 export.py --checkpoint_file_path=FILE --file_format=FORMAT`.

FORMAT is CKPT, MINDIR, ONNX or SAFETENSORS. `--file_format=ONNX --quantize=int8` also writes an
8-bit ONNX file. Blocks are fused into plain convolutions unless --fuse=0. The written file is
loaded back and compared with the checkpoint.
"""

from typing import TYPE_CHECKING

from src.cli.run import run

if TYPE_CHECKING:
    from src.cli.command import Command


def main(command: "Command") -> None:
    command.start_mindspore()
    from src.inference.export import export

    export(command)


if __name__ == "__main__":
    run(main, __doc__)
