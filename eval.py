"""Evaluate a checkpoint or a folder of them: `python3 eval.py --data_path=DIR --checkpoint_file_path=FILE_OR_FOLDER`.

Network, block, preprocessing and class indices come from each checkpoint; flags win. Under mpirun the images are shared out.
"""

from src.command import begin, run_main
from src.parallel.environment import launched_rank


def main(arguments: list[str]) -> None:
    command = begin(arguments)
    config, communicator = command.config, command.communicator
    from src.parallel.long_task import note
    if communicator.is_root and config.checkpoint_file_path:
        note(f"loading {config.checkpoint_file_path}")
    from src.inference.engines import faster_engine_hint
    from src.inference.evaluation import evaluate_checkpoints, report_line, seeds_line, write_results
    from src.runs.checkpoint import find_checkpoints
    from src.utils.errors import Incomplete
    from src.utils.log import create_log

    paths = find_checkpoints(config.checkpoint_file_path)
    command.select_device()
    log = create_log(shown=communicator.is_root)
    if hint := faster_engine_hint(config):
        log(hint)
    results, failures = evaluate_checkpoints(paths, command.flags, communicator, log)
    best = max(results, key=lambda result: result["top1"])
    if len(results) > 1:
        log("best: " + report_line(best))
    log(seeds_line(best))
    if communicator.is_root and config.result_path:
        write_results(config.result_path, results)
        log(f"results in {config.result_path}")
    if failures:
        raise Incomplete(f"{len(failures)} of {len(paths)} checkpoints could not be evaluated, the first is {failures[0]}")


if __name__ == "__main__":
    run_main(main, launched_rank(), takes_keys=True)
