"""Classify images: `python3 predict.py --checkpoint_file_path=FILE IMAGE_OR_FOLDER... [--result_path=FILE.json] [--save_figure=FILE.png]`.

Takes checkpoints and exported files (.ckpt, .safetensors, .pth, .hdf5, .onnx, .mindir) and prints the five likeliest classes.
"""

from src.utils.launch import run_main


def main(arguments):
    from src.utils.config import load_config, parse_flags
    from src.utils.device import prepare_process, select_device
    from src.utils.errors import UserError
    from src.utils.log import create_logger

    flags, names = parse_flags(arguments)
    if not names:
        raise UserError("no image given: python3 predict.py --checkpoint_file_path=FILE IMAGE_OR_FOLDER...")
    config = load_config(flags)
    # MindSpore reads its environment when it is imported, so everything that imports it comes after this line.
    prepare_process(local_rank=0, local_size=1, device_target=config.device_target)
    from src.training.checkpoint import find_checkpoints
    from src.training.evaluation import write_results
    from src.training.inference import open_engine
    from src.training.prediction import as_table, contact_sheet, find_images, predict

    paths = find_images(names)
    select_device(config.device_target, config.device_id or 0)
    recorded, engine, _ = open_engine(find_checkpoints(config.checkpoint_file_path)[-1], flags)
    predictions = predict(paths, recorded, engine)
    log = create_logger(rank=0).info
    if config.result_path:
        write_results(config.result_path, [prediction.as_dict() for prediction in predictions])
        log(f"results in {config.result_path}")
    else:
        log(as_table(predictions))
    if config.save_figure:
        contact_sheet(predictions, config.save_figure)
        log(f"figure in {config.save_figure}")


if __name__ == "__main__":
    run_main(main)
