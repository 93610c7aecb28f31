"""Export a checkpoint: `python3 export.py --checkpoint_file_path=FILE --file_format=FORMAT [--fuse=0|1] [--result_path=FILE]`.

FORMAT is CKPT, MINDIR, ONNX or SAFETENSORS.
ACNet checkpoints are fused into the plain network unless --fuse=0. What was written is loaded back and compared before it counts.
"""

from src.utils.launch import run_main


def main(arguments):
    from src.utils.config import load_config, parse_only_flags
    from src.utils.device import prepare_process, select_device
    from src.utils.log import create_logger

    flags = parse_only_flags(arguments)
    config = load_config(flags)
    # MindSpore reads its environment when it is imported, so everything that imports it comes after this line.
    prepare_process(local_rank=0, local_size=1, device_target=config.device_target)
    from src.training.checkpoint import find_checkpoints
    from src.training.export import export_checkpoint

    path = find_checkpoints(config.checkpoint_file_path)[-1]
    select_device(config.device_target, config.device_id or 0)
    log = create_logger(rank=0).info
    exported = export_checkpoint(path, flags, config.file_format, config.fuse, config.result_path)
    for title, size in (("checkpoint", exported.original), ("exported", exported.exported)):
        log(f"{title}: {size.parameters:,} parameters, {size.multiply_adds / 1e9:.3f} G multiply-adds an image")
    log(f"file sizes: {path} {path.stat().st_size / 1e6:.2f} MB, {exported.path} {exported.path.stat().st_size / 1e6:.2f} MB")
    log(f"exported to {exported.path}: largest relative difference {exported.difference:.1e}")


if __name__ == "__main__":
    run_main(main)
