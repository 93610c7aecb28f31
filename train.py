"""Train an image classifier: `python3 train.py [--config_path=RECIPE] [--data_path=DIR] [--KEY=VALUE ...]`.

Without arguments the bundled digits are trained. `mpirun -n N python3 train.py --run_distribute=1 ...` trains on N ranks.
"""

import os
from typing import TYPE_CHECKING

from src.command import begin, ranks_hint, run_main
from src.parallel.environment import launched_rank
from src.utils.signals import Signals

if TYPE_CHECKING:
    from src.parallel.communicator import Communicator
    from src.runs.recorder import Recorder
    from src.runs.run_folder import RunFolder
    from src.utils.config import Config


def main(arguments: list[str], signals: Signals) -> None:
    command = begin(arguments)
    config, communicator = command.config, command.communicator
    from src.kernels.library import choose_kernels
    from src.parallel.agreement import agree
    from src.runs.run_folder import dated_run_folder
    from src.training.data import check_training_keys, open_image_sets, resolve_data
    from src.training.fitting import fit_batch

    check_training_keys(config)
    train_images, eval_images = open_image_sets(config, communicator)
    config = resolve_data(config, train_images)
    kernels = choose_kernels(config)
    agree(communicator, {"kernels": kernels.name}, "the same --kernels, or the same processors and set-up on every host")
    agree(communicator, {**train_images.facts("training"), **(eval_images.facts("validation") if eval_images else {})})
    folder = dated_run_folder(config.output_path)
    log_first_line(config, communicator, folder)

    # Only now, because MindSpore takes seconds to import and wrong commands are reported by here.
    from src.dataset.sources import left_out_line
    from src.inference.deployment import deploy
    from src.models.build import create_network
    from src.parallel.stopping import StopRequest
    from src.runs.resume import find_resume_point, resume_line
    from src.training.graph_cache import user_graph_cache
    from src.training.pretrained import read_pretrained
    from src.training.reducers import uses_collectives
    from src.training.rehearsal import rehearse
    from src.training.trainer import Trainer
    from src.utils.config import DIGITS

    command.select_device(collectives=uses_collectives(config, communicator))
    pretrained = read_pretrained(config.checkpoint_file_path) if config.checkpoint_file_path else None
    if pretrained:
        config = pretrained.configure(command.flags, config)
        check_training_keys(config)
        agree(communicator, pretrained.recorded, "the same file of weights on every host")
    config = fit_batch(config, len(train_images), communicator)
    network = create_network(config, kernels=kernels.library)
    starting = pretrained.load(network, config, train_images.class_to_index) if pretrained else None
    resumed = find_resume_point(config, communicator) if config.resume else None
    recorder = create_recorder(config, communicator, resumed.run_folder if resumed else folder, kernels.name)
    graph_cache = None if config.dry_run else user_graph_cache(config)
    trainer = Trainer(network, config, communicator, train_images, eval_images, recorder, resumed, graph_cache, kernels.name)

    for hint in (kernels.hint, ranks_hint(config, communicator.size, kernels.name)):
        if hint:
            recorder.log(hint)
    if config.data_path == DIGITS:
        recorder.log("training on the bundled handwritten digits; --data_path=DIR trains on your own images")
    one_class = "there is one class of images only; nothing can be told apart" if config.num_classes == 1 else None
    only_classifier = (f"freeze_epochs={config.freeze_epochs} are all of the epochs: the classifier alone learns"
                       if config.freeze_epochs >= config.max_epoch else None)
    for line in (left_out_line(train_images, "training"), left_out_line(eval_images, "validation") if eval_images else None, one_class,
                 None if resumed else starting, only_classifier):
        if line:
            recorder.log(line)
    if resumed:
        recorder.log(resume_line(resumed, communicator.size, trainer.threads, kernels.name))
    recorder.log(f"{config.network} block={config.block} on {communicator.size} x {config.device_target}: "
                 f"{len(train_images)} images, {config.num_classes} classes, {trainer.steps_per_epoch} steps of "
                 f"{trainer.batches.global_batch} images per epoch, {config.max_epoch} epochs")
    if config.dry_run:
        for line in rehearse(trainer, config, communicator):
            recorder.log(line)
        return
    with StopRequest(signals, communicator) as stop_request:
        rate = trainer.run(stop_request)
    # A run that was resumed at its end has none.
    if rate:
        recorder.log(f"FPS: {rate:.2f} img/s in total, {rate / communicator.size:.2f} img/s per device, "
                     f"{rate / trainer.batches.global_batch:.2f} it/s")
    if config.deploy and eval_images:
        deploy(network, config, communicator, eval_images, recorder)
    recorder.log_place()


def log_first_line(config: "Config", communicator: "Communicator", folder: "RunFolder") -> None:
    """Before the seconds, or minutes, that go by until the first step: what begins, and where its log will be."""
    from src.utils.log import create_log

    places = ", ".join(f"{host}: {communicator.hosts.count(host)}" for host in dict.fromkeys(communicator.hosts))
    where = ("a dry run" if config.dry_run else f"goes on under {config.output_path}" if config.resume else f"the log will be {folder.log}")
    name = os.path.basename(config.checkpoint_file_path) or config.network
    create_log(shown=communicator.is_root)(f"{name} on {communicator.size} x {config.device_target}"
                                           + (f" ({places})" if places.count(":") > 1 else "") + f": loading; {where}")


def create_recorder(config: "Config", communicator: "Communicator", folder: "RunFolder", kernels: str) -> "Recorder":
    """What reports and saves: on rank 0 into the run's folder, which is made if it is a new one."""
    from src.dataset.batches import global_batch
    from src.parallel.launcher import tell_launcher
    from src.runs.recorder import LogOnly, Recorder, RunRecorder
    from src.runs.run_folder import create_run_folder
    from src.utils.log import create_log
    from src.utils.versions import software

    if not communicator.is_root:
        return Recorder()
    if config.dry_run:
        return LogOnly(create_log())
    folder = folder if config.resume else create_run_folder(folder)
    tell_launcher(run_folder=str(folder.path.resolve()), accumulation_steps=config.accumulation_steps,
                  global_batch_size=global_batch(config, communicator.size))
    environment = {"hosts": communicator.hosts, "device": config.device_target, "kernels": kernels, **software()}
    return RunRecorder(folder, config, create_log(file=folder.log), environment)


if __name__ == "__main__":
    run_main(main, launched_rank(), defers_signals=True, takes_keys=True)
