"""Export a checkpoint: `python3 export.py --checkpoint_file_path=FILE --file_format=FORMAT [--fuse=0|1] [--result_path=FILE]`.

FORMAT is CKPT, MINDIR, ONNX or SAFETENSORS.
Networks with blocks are fused into the plain network unless --fuse=0. What was written is loaded back and compared before it counts.
"""

from src.command import begin, run_main


def main(arguments: list[str]) -> None:
    command = begin(arguments, distributed=False)
    config = command.config
    from src.inference.export import export_checkpoint
    from src.runs.checkpoint import find_checkpoints
    from src.utils.log import create_log

    path = find_checkpoints(config.checkpoint_file_path)[-1]
    command.select_device()
    exported = export_checkpoint(path, command.flags, config.file_format, config.fuse, config.result_path)
    log = create_log()
    for title, size in (("checkpoint", exported.original), ("exported", exported.exported)):
        log(f"{title}: {size.parameters:,} parameters, {size.multiply_adds / 1e9:.3f} G multiply-adds per image")
    log(f"file sizes: {path} {path.stat().st_size / 1e6:.2f} MB, {exported.path} {exported.path.stat().st_size / 1e6:.2f} MB")
    log(f"exported to {exported.path}: largest relative difference {exported.difference:.1e}")


if __name__ == "__main__":
    run_main(main, takes_keys=True)
