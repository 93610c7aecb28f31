"""Export a checkpoint: `python3 export.py --checkpoint_file_path=FILE --file_format=FORMAT [--fuse=0|1] [--result_path=FILE]`.

FORMAT is CKPT, MINDIR, ONNX or SAFETENSORS; `--file_format=ONNX --quantize=int8` writes 8-bit integers beside it.
Networks with blocks are fused into the plain network unless --fuse=0. What was written is loaded back and compared before it counts.
"""

from src.command import begin, run_main


def main(arguments: list[str]) -> None:
    command = begin(arguments, distributed=False)
    config = command.config
    from src.parallel.long_task import note
    from src.utils.errors import UserError
    from src.utils.log import create_log

    if config.quantize != "none" and config.file_format != "ONNX":
        raise UserError(f"quantize={config.quantize} writes ONNX: add --file_format=ONNX")
    if config.checkpoint_file_path:
        note(f"loading {config.checkpoint_file_path}")
    from src.inference.export import export_checkpoint
    from src.runs.checkpoint import choose_checkpoint

    path = choose_checkpoint(config.checkpoint_file_path, note)
    command.select_device()
    exported = export_checkpoint(path, command.flags, config.file_format, config.fuse, config.result_path)
    log = create_log()
    for title, size in (("checkpoint", exported.original), ("exported", exported.exported)):
        log(f"{title}: {size.parameters:,} parameters, {size.multiply_adds / 1e9:.3f} G multiply-adds per image")
    log(f"file sizes: {path} {path.stat().st_size / 1e6:.2f} MB, {exported.path} {exported.path.stat().st_size / 1e6:.2f} MB")
    log(f"exported to {exported.path}: largest relative difference {exported.difference:.1e}")
    if config.quantize == "int8":
        from src.inference.evaluation import tops
        from src.inference.quantization import quantize

        found = quantize(exported.path, command.flags, config.calibration_images, log)
        for title, accuracy, file in (("float32", found.float32, exported.path), ("int8", found.int8, found.path)):
            log(f"{title}: {tops(accuracy.top1, accuracy.top5)}, {accuracy.images_per_second:.1f} images/s, "
                f"{file.stat().st_size / 1e6:.2f} MB, {file}")


if __name__ == "__main__":
    run_main(main, takes_keys=True)
