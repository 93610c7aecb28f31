"""Train an image classifier: `python3 train.py [--config_path=RECIPE] [--data_path=DIR] [--KEY=VALUE ...]`.

With no argument the bundled digits are trained. `mpirun -n N python3 train.py --run_distribute=1 ...` trains on N ranks.
"""

from src.parallel.launcher import launched_rank
from src.utils.launch import run_main


def main(arguments, signals):
    from src.parallel.communicator import connect
    from src.utils.config import DIGITS, load_config, parse_only_flags
    from src.utils.device import prepare_process, select_device
    from src.utils.log import create_logger

    flags = parse_only_flags(arguments)
    config = load_config(flags)
    communicator = connect(config.run_distribute)
    communicator.watch_for_stalls(config.stall_timeout_s)
    # MindSpore reads its environment when it is imported, so everything that imports it comes after this line.
    prepare_process(communicator.local_rank, communicator.local_size, config.device_target)
    from src.training.data import check_device_keys, open_eval_images, open_train_images, resolve_classes

    check_device_keys(config)
    train_images = open_train_images(config, communicator)
    config = resolve_classes(config, train_images)
    eval_images = open_eval_images(config, train_images) if config.run_eval else None

    # Only now, because MindSpore takes seconds to import and wrong commands have been told by here.
    from src.parallel.stopping import StopRequest
    from src.training.graph_cache import user_graph_cache
    from src.training.records import create_run_folder
    from src.training.resume import find_resume_point, resume_line
    from src.training.setup import create_network, start_from_checkpoint
    from src.training.trainer import Trainer

    select_device(config.device_target, config.device_id if config.device_id is not None else communicator.local_rank,
                  communicator.size)
    network = create_network(config)
    left_out = start_from_checkpoint(network, config) if config.checkpoint_file_path else []
    resumed = find_resume_point(config, communicator) if config.resume else None

    run_folder = None
    if communicator.is_root:
        run_folder = resumed.run_folder if resumed else create_run_folder(config.output_path)
    log = create_logger(communicator.rank, run_folder and run_folder.log).info
    trainer = Trainer(network, config, communicator, train_images, eval_images, run_folder, log, resumed, user_graph_cache(config))
    if run_folder:
        run_folder.write_start(config, train_images.class_to_index)
    if config.data_path == DIGITS:
        log("training on the bundled handwritten digits; --data_path=DIR trains on your own images")
    if config.checkpoint_file_path:
        log(f"starting from {config.checkpoint_file_path}" + (f" without {', '.join(left_out)}" if left_out else ""))
    if resumed:
        log(resume_line(resumed, communicator.size))
    log(f"{config.network} block={config.block} on {communicator.size} x {config.device_target}: "
        f"{len(train_images)} images, {config.num_classes} classes, {trainer.steps_per_epoch} steps of "
        f"{trainer.batches.global_batch} images an epoch, {config.max_epoch} epochs")
    with StopRequest(signals, communicator) as stop_request:
        rate = trainer.run(stop_request)
    log(f"{rate / communicator.size:.2f} images/s per device, {rate:.2f} images/s in total")
    if run_folder:
        log(f"results in {run_folder.path} (checkpoints in {run_folder.checkpoints}/)")


if __name__ == "__main__":
    run_main(main, launched_rank(), defers_signals=True)
