"""Images a second of the input pipelines next to PyTorch's DataLoader with Pillow:

    python3 benchmarks/input_pipeline.py [--images=768] [--workers=2] [--batch=64] [--rounds=2]

500x375 JPEGs of about 50 kB, written to a temporary folder. Training: random resized crop to 224,
flip, colour jitter 0.4; evaluation: resize to 256x256, centre crop. PyTorch's batches are
normalised float32, as its networks take them; ours are uint8, normalised in the network's graph (so
the time of that, `normalise_s` a batch, is printed too). "mindspore" is --input_pipeline=mindspore.
In turn, best of the rounds. Then reading
alone, in random order, of a packed set, of MindSpore's MindRecord and of files, the median of the
rounds. Last come 32x32 JPEGs, which are decoded in the first epoch only. `--pytorch=0` leaves
PyTorch out, for which `bash scripts/setup.sh --parity` is needed.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import medians_in_turn  # noqa: E402
from src.cli.run import run_process  # noqa: E402

_SIZE, _RESIZED = 224, 256
_SMALL_IMAGES = 5120
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pytorch", type=int, default=1)
    options = parser.parse_args(arguments)
    from src.utils.device import prepare_process

    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder) / "train" / "a", options.images)
        from src.dataset.packed import pack
        from src.dataset.sources import open_images

        images = open_images(f"{folder}/train", "train")
        pack(images, f"{folder}/train.safetensors", 256, 90, options.workers, lambda count: None)
        packed = open_images(f"{folder}/train.safetensors", "train")
        for part in ("train", "eval"):
            print_rates(part, images, packed, options)
        print_readers(images, f"{folder}/same_bytes", options)
        print_operations(images)
        print_small(f"{folder}/small", options)


def write_jpegs(folder, count):
    """Smooth random pictures that compress to about 50 kB, as photographs do."""
    import cv2
    import numpy as np

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = cv2.resize(
            random.integers(0, 256, (24, 32, 3), np.uint8),
            (500, 375),
            interpolation=cv2.INTER_CUBIC,
        )
        grain = random.normal(0, 2.5, (375, 500, 1))
        cv2.imwrite(
            str(folder / f"{number:05d}.jpg"),
            np.clip(coarse + grain, 0, 255).astype(np.uint8),
            [cv2.IMWRITE_JPEG_QUALITY, 90],
        )


def print_rates(part, images, packed, options):
    sides = {
        "folder": lambda: our_rate(part, images, options),
        "packed_256": lambda: our_rate(part, packed, options),
        "mindspore": lambda: our_rate(part, images, options, "mindspore"),
    }
    if options.pytorch:
        sides["pytorch"] = lambda: pytorch_rate(part, images.paths, options)
    rates = dict.fromkeys(sides, 0.0)
    for _ in range(options.rounds):
        for side, measure in sides.items():
            rates[side] = max(rates[side], measure())
    ratios = "".join(
        f" {side}_over_pytorch={rates[side] / rates['pytorch']:.2f}"
        for side in ("folder", "packed_256", "mindspore")
        if options.pytorch
    )
    print(
        f"input_pipeline part={part} workers={options.workers} batch={options.batch} "
        + " ".join(f"{side}_images_per_second={rate:.0f}" for side, rate in rates.items())
        + ratios,
        flush=True,
    )


def our_rate(part, images, options, pipeline="own"):
    from src.cli.recipes import load_config
    from src.dataset.batches import EvalBatches, TrainBatches, prefetch
    from src.dataset.imagefolder import MindSporeEvalBatches, MindSporeTrainBatches

    config = load_config(
        {
            "data_path": "none",
            "per_batch_size": str(options.batch),
            "max_epoch": "1",
            "num_parallel_workers": str(options.workers),
        }
    )
    if part == "train":
        kind = TrainBatches if pipeline == "own" else MindSporeTrainBatches
        batches = kind(images, config, 0, 1)
    else:
        kind = EvalBatches if pipeline == "own" else MindSporeEvalBatches
        batches = kind(images, config, 0, 1, options.batch)
    return timed(prefetch(batches), options.batch)


def pytorch_rate(part, paths, options):
    import torch

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return pillow_sample(paths[index], part), 0

    loader = torch.utils.data.DataLoader(
        Files(), options.batch, shuffle=part == "train", num_workers=options.workers, drop_last=True
    )
    return timed(iter(loader), options.batch)


def pillow_sample(path, part):
    """One image as PyTorch's users prepare it: (3, 224, 224) float32."""
    import random

    import numpy as np
    import torch
    from PIL import Image, ImageEnhance

    with Image.open(path) as file:
        image = file.convert("RGB")
    if part == "eval":
        image = image.resize((_RESIZED, _RESIZED), Image.BILINEAR)
        start = (_RESIZED - _SIZE) // 2
        image = image.crop((start, start, start + _SIZE, start + _SIZE))
    else:
        area, ratio = (
            image.width * image.height * random.uniform(0.08, 1),
            math.exp(random.uniform(math.log(0.75), math.log(1.333))),
        )
        width = min(round(math.sqrt(area * ratio)), image.width)
        height = min(round(math.sqrt(area / ratio)), image.height)
        left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
        image = image.resize(
            (_SIZE, _SIZE), Image.BILINEAR, (left, top, left + width, top + height)
        )
        if random.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        for enhance in random.sample(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3
        ):
            image = enhance(image).enhance(random.uniform(0.6, 1.4))
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return tensor.sub_(torch.tensor(_MEAN).view(3, 1, 1)).div_(torch.tensor(_STD).view(3, 1, 1))


def timed(batches, batch):
    """Images a second from the second batch to the last."""
    next(batches)
    started, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
    return count * batch / (time.perf_counter() - started)


def print_readers(images, target, options):
    """Images a second of reading alone, in random order.

    A packed set here, MindSpore's MindRecord, and files of their own.
    """
    import mindspore.dataset
    import numpy as np
    from mindspore.mindrecord import FileWriter

    from src.dataset.packed import pack
    from src.dataset.sources import open_images

    pack(images, f"{target}.safetensors", 0, 90, options.workers, lambda count: None)
    packed = open_images(f"{target}.safetensors", "train").packed
    writer = FileWriter(f"{target}.mindrecord")
    writer.add_schema({"image": {"type": "bytes"}, "label": {"type": "int32"}})
    writer.write_raw_data(
        [
            {"image": Path(path).read_bytes(), "label": int(label)}
            for path, label in zip(images.paths, images.labels)
        ]
    )
    writer.commit()
    order = np.random.default_rng(0).permutation(len(images)).tolist()

    def mindrecord():
        rows = mindspore.dataset.MindDataset(
            f"{target}.mindrecord",
            ["image", "label"],
            num_parallel_workers=options.workers,
            sampler=mindspore.dataset.SubsetSampler(order),
        )
        return [row["image"] for row in rows.create_dict_iterator(num_epochs=1, output_numpy=True)]

    sides = {
        "packed": lambda: [packed.encoded(index) for index in order],
        "mindrecord": mindrecord,
        "files": lambda: [np.fromfile(images.paths[index], np.uint8) for index in order],
    }
    seconds = medians_in_turn(sides, options.rounds)
    print(
        "input_pipeline reading_alone_images_per_second "
        + " ".join(f"{side}={len(order) / taken:.0f}" for side, taken in seconds.items()),
        flush=True,
    )


def print_small(folder, options):
    """Images a second of 32x32 JPEGs, padded, cropped and flipped, in the first two epochs."""
    import cv2
    import numpy as np

    from src.cli.recipes import load_config
    from src.dataset.batches import TrainBatches, prefetch
    from src.dataset.sources import open_images

    random, place = np.random.default_rng(0), Path(folder) / "a"
    place.mkdir(parents=True)
    for number in range(_SMALL_IMAGES):
        cv2.imwrite(str(place / f"{number}.jpg"), random.integers(0, 256, (32, 32, 3), np.uint8))
    config = load_config(
        {
            "config_path": "acnet_cifar_quick_cifar10",
            "data_path": folder,
            "max_epoch": "2",
            "num_parallel_workers": str(options.workers),
        }
    )
    source = TrainBatches(open_images(folder, "train"), config, 0, 1)
    first, second = (
        timed(prefetch(source, epoch * source.per_epoch, (epoch + 1) * source.per_epoch), 128)
        for epoch in range(2)
    )
    print(
        f"input_pipeline part=small workers={options.workers} "
        f"first_epoch_images_per_second={first:.0f} second_epoch_images_per_second={second:.0f}",
        flush=True,
    )


def print_operations(images):
    """Milliseconds of each operation on one image and thread."""
    import cv2
    import numpy as np
    from mindspore import GRAPH_MODE, Tensor, set_context, set_device

    from src.cli.recipes import load_config
    from src.dataset import transforms
    from src.dataset.augmentations import sample_generator
    from src.models.layers import InputNormalizer

    config = load_config({"data_path": "none"})
    resize = transforms.Resizing.of(config)
    encoded = [np.fromfile(path, np.uint8) for path in images.paths[:64]]
    decoded = [images.load(index) for index in range(len(encoded))]
    small = [resize(image, _SIZE, _SIZE) for image in decoded]
    random = sample_generator(1, 0, 0)
    operations = {
        "draw": (lambda index: sample_generator(1, 0, index), range(len(encoded))),
        "decode": (lambda data: cv2.imdecode(data, cv2.IMREAD_COLOR_RGB), encoded),
        "decode_half": (lambda data: cv2.imdecode(data, cv2.IMREAD_REDUCED_COLOR_2), encoded),
        "crop_resize": (
            lambda image: transforms.random_resized_crop(
                image, random, _SIZE, config.crop_scale, config.crop_ratio, resize
            ),
            decoded,
        ),
        "flip": (lambda image: cv2.flip(image, 1), small),
        "jitter": (lambda image: transforms.color_jitter(image, random, 0.4, 0.4, 0.4), small),
        "eval_transform": (lambda image: transforms.eval_transform(image, config), decoded),
    }
    cv2.setNumThreads(0)
    times = {}
    for name, (operation, inputs) in operations.items():
        started = time.perf_counter()
        for value in inputs:
            operation(value)
        times[name] = 1000 * (time.perf_counter() - started) / len(inputs)
    set_context(mode=GRAPH_MODE)
    set_device("CPU")
    normalizer, batch = InputNormalizer(_MEAN, _STD), Tensor(np.stack(small))
    normalizer(batch).asnumpy()
    started = time.perf_counter()
    normalizer(batch).asnumpy()
    print(
        "input_pipeline one_image_one_thread_ms "
        + " ".join(f"{name}={value:.2f}" for name, value in times.items())
        + f" decode_limit_images_per_second_and_thread={1000 / times['decode']:.0f}"
        + f" normalise_s={time.perf_counter() - started:.4f}_of_{len(small)}_images"
    )


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
