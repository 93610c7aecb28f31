"""Serve a network over HTTP: `python3 serve.py --checkpoint_file_path=FILE [--port=8000]`.

The page at / takes pictures; `curl --data-binary @photo.jpg http://127.0.0.1:8000/predict` answers
with classes as JSON. After SIGTERM the accepted requests are still answered.
"""

from typing import TYPE_CHECKING

from src.cli.run import run

if TYPE_CHECKING:
    from src.cli.command import Command


def main(command: "Command") -> None:
    if command.needs_mindspore:
        command.start_mindspore()
    from src.inference.serving import serve

    serve(command)


if __name__ == "__main__":
    run(main, __doc__)
