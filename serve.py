"""Serve a network over HTTP: `python3 serve.py --checkpoint_file_path=FILE [--host=127.0.0.1] [--port=8000]`.

A page to drop pictures on at /; `curl --data-binary @photo.jpg http://127.0.0.1:8000/predict` answers classes as JSON.
SIGTERM ends it when what was accepted is answered.
"""

from src.command import begin, run_main
from src.utils.signals import Signals


def main(arguments: list[str], signals: Signals) -> None:
    command = begin(arguments, distributed=False)
    config = command.config
    from src.parallel.long_task import note
    if config.checkpoint_file_path:
        note(f"loading {config.checkpoint_file_path}")
    from src.inference.engines import open_engines
    from src.inference.serving import create_app, import_server, serve
    from src.runs.checkpoint import choose_checkpoint
    from src.utils.log import create_log

    import_server()
    path = choose_checkpoint(config.checkpoint_file_path, note)
    command.select_device()
    model, engines = open_engines(path, command.flags)
    log = create_log()
    serve(create_app(model, engines), config.host, config.port, signals,
          lambda address: log(f"serving {model.config.network} of {path} on {address}"))
    log("stopped; every request that was accepted is answered")


if __name__ == "__main__":
    run_main(main, defers_signals=True, takes_keys=True)
