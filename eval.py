"""Evaluate a checkpoint or a folder of them: `python3 eval.py --data_path=DIR --checkpoint_file_path=FILE_OR_FOLDER`.

Network, block, preprocessing and class indices come from each checkpoint; flags win. Under mpirun the images are shared out.
"""

from src.parallel.launcher import launched_rank
from src.utils.launch import run_main


def main(arguments):
    from src.parallel.communicator import connect
    from src.utils.config import load_config, parse_only_flags
    from src.utils.device import prepare_process, select_device
    from src.utils.log import create_logger

    flags = parse_only_flags(arguments)
    config = load_config(flags)
    communicator = connect(config.run_distribute)
    communicator.watch_for_stalls(config.stall_timeout_s)
    # MindSpore reads its environment when it is imported, so everything that imports it comes after this line.
    prepare_process(communicator.local_rank, communicator.local_size, config.device_target)
    from src.training.checkpoint import find_checkpoints
    from src.training.evaluation import evaluate_checkpoints, report_line, write_results
    from src.training.inference import faster_engine_hint

    paths = find_checkpoints(config.checkpoint_file_path)
    select_device(config.device_target, config.device_id if config.device_id is not None else communicator.local_rank)
    log = create_logger(communicator.rank).info
    if hint := faster_engine_hint(config):
        log(hint)
    results = evaluate_checkpoints(paths, flags, communicator, log)
    if len(results) > 1:
        log("best: " + report_line(max(results, key=lambda result: result["top1"])))
    if communicator.is_root and config.result_path:
        write_results(config.result_path, results)
        log(f"results in {config.result_path}")


if __name__ == "__main__":
    run_main(main, launched_rank())
