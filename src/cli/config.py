"""The keys of the configuration: each with its type, default, help, effect and commands.

This is the only place where a key is defined. Flags, ``--help``, completion and default_config.yaml
come from it; `python3 -m src.cli.config > default_config.yaml` writes that file.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from src.utils.errors import UserError, suggestion

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = PROJECT_ROOT / "default_config.yaml"
RECIPES = PROJECT_ROOT / "configs"
DIGITS = "digits"

_SCRIPTS = ("preview_dataset", "check_dataset")
COMMANDS = ("train", "eval", "predict", "export", "serve", "report", *_SCRIPTS)
_USES_MODEL = ("train", "eval", "predict", "export", "serve")
_READS_DATA = ("train", "eval", "export", "report", *_SCRIPTS)
_AUGMENTS = ("train", "preview_dataset")
_TRAIN = ("train",)


class Affects(Enum):
    """What a key affects. Each key has exactly one effect.

    From it follows which keys must be the same in a resumed run, in a cached graph and on every
    rank, and which ones evaluation takes from a checkpoint.
    """

    MODEL = "the network in a checkpoint, and how images are prepared for it"
    GRAPH = "the compiled forward and backward pass"
    TRAINING = "other things that training computes"
    IMAGES = "where images are found; ranks may find the same images at different paths"
    BATCH = "how many images are processed at a time"
    RUN = "how a command runs and what it reports, the same on all ranks"
    PROCESS = "a single process: its paths, devices and threads"


@dataclass(frozen=True)
class KeyInfo:
    """Properties of a key other than its type and default.

    Attributes:
        commands: the commands that use it.
        help: one line.
        needs: the setting that must be in effect for the key to matter in training, as "KEY=VALUE"
            or "KEY=VALUE|VALUE", or "KEY" for one that must be set; KEY may be a property.
    """

    affects: Affects
    commands: tuple[str, ...]
    help: str
    needs: str = ""


def key(
    default: Any,
    affects: Affects,
    help: str,
    commands: Sequence[str] | None = None,
    needs: str = "",
) -> Any:
    """A field of Config. By default the commands follow from what the key affects."""
    if commands is None:
        only_training = affects in (Affects.TRAINING, Affects.GRAPH)
        commands = _TRAIN if only_training else COMMANDS
    info = KeyInfo(affects, tuple(commands), help, needs)
    return Field(default, json_schema_extra={"info": info})  # type: ignore[dict-item]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _amp_level(value: Any) -> Any:
    return "auto" if _lower(value) == "auto" else _upper(value)


def _resume(value: Any) -> Any:
    """Also takes the ACNet repository's words: ``continue``, and ``fs`` for "from scratch"."""
    return {"continue": "auto", "fs": ""}.get(value, value)


def _device_name(value: Any) -> Any:
    return {"cpu": "CPU", "gpu": "GPU", "ascend": "Ascend"}.get(_lower(value), value)


def _as_list(value: Any) -> Any:
    """`30,60,90` on the command line is a list."""
    if isinstance(value, str):
        return value.strip("[]() ").replace(",", " ").split()
    return [value] if isinstance(value, (int, float)) else value


def _word_or_list(value: Any) -> Any:
    """A word stays a word; `1,2.5` is a list."""
    is_word = isinstance(value, str) and value.strip().isalpha()
    return value.strip().lower() if is_word else _as_list(value)


def _as_specs(value: Any) -> Any:
    """`crop, mixup(alpha=0.2, probability=0.5)` is a list of two."""
    if not isinstance(value, str):
        return value
    specs, depth = [""], 0
    for letter in value.strip().removeprefix("[").removesuffix("]"):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth <= 0:
            specs.append("")
        else:
            specs[-1] += letter
    return [spec.strip() for spec in specs if spec.strip()]


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0)]
NonNegativeReal = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rgb = Annotated[tuple[float, float, float], BeforeValidator(_as_list)]
PositiveRgb = Annotated[tuple[PositiveReal, PositiveReal, PositiveReal], BeforeValidator(_as_list)]
Probabilities = Annotated[tuple[Probability, Probability, Probability], BeforeValidator(_as_list)]
Interval = Annotated[tuple[float, float], BeforeValidator(_as_list)]
Epochs = Annotated[list[PositiveReal], BeforeValidator(_as_list)]
Specs = Annotated[list[str], BeforeValidator(_as_specs)]
ClassWeights = Annotated[
    Literal["none", "balanced"] | Annotated[list[PositiveReal], Field(min_length=1)],
    BeforeValidator(_word_or_list),
]
Word = BeforeValidator(_lower)


class _Keys(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class _Network(_Keys):
    """Network"""

    network: str = key(
        "resnext50_32x4d", Affects.MODEL, "name or alias of the network; --list shows all"
    )
    block: str = key(
        "base",
        Affects.MODEL,
        "base; acb, repvgg or dbb: replaces every 3x3 and 5x5 convolution by such a block",
    )
    num_classes: NonNegative = key(
        0, Affects.MODEL, "0: taken from the data or checkpoint; otherwise must match it"
    )
    image_size: Annotated[int, Field(ge=8, le=2048)] = key(
        224, Affects.MODEL, "side of the square input in pixels"
    )
    gamma_init: PositiveReal | None = key(
        None,
        Affects.MODEL,
        "initial batch-norm scale inside blocks; null: 1 (ACNet's code: 1/3 on CIFAR)",
        _TRAIN,
        needs="block=acb|repvgg|dbb",
    )
    dropout: Fraction = key(
        0.5,
        Affects.MODEL,
        "drop probability before the last layers of AlexNet and MobileNetV2, in training only",
        _TRAIN,
        needs="network=alexnet|mobilenet_v2|mobilenetv2",
    )
    stochastic_depth: Fraction = key(
        0.0,
        Affects.GRAPH,
        "probability of dropping the last residual branch of an image in training; for earlier "
        "branches it rises linearly from 0",
    )
    weight_init: Annotated[Literal["kaiming_uniform", "kaiming_normal"], Word] = key(
        "kaiming_uniform",
        Affects.TRAINING,
        "kaiming_uniform: PyTorch's default, within 1 / sqrt(fan-in); kaiming_normal: by fan-out, "
        "as in torchvision's ResNets",
    )
    zero_init_residual: bool = key(
        False, Affects.TRAINING, "1: start each residual branch as the identity, with scale 0"
    )
    sync_bn: bool = key(False, Affects.GRAPH, "1: batch-norm statistics over all ranks (Ascend)")


class _Data(_Keys):
    """Data"""

    data_path: str = key(
        "",
        Affects.IMAGES,
        "training images: class folders, a list file, a tree with train_list.txt, a CIFAR folder, "
        "a packed set, or 'digits' (bundled)",
        _READS_DATA,
    )
    eval_data_path: str = key(
        "",
        Affects.IMAGES,
        "validation images; '': the validation part next to data_path",
        _READS_DATA,
        needs="evaluates",
    )
    val_split: Annotated[Literal["auto"] | Fraction, Word] = key(
        0.0,
        Affects.IMAGES,
        "fraction of each class held out for validation (seeded); auto: 0.2 if there is no "
        "validation set",
        _READS_DATA,
    )
    dataset_format: Annotated[str, Word] = key(
        "auto", Affects.IMAGES, "auto, packed, cifar10, cifar100, list, folder", _READS_DATA
    )
    sampling: Annotated[Literal["uniform", "balanced"], Word] = key(
        "uniform",
        Affects.TRAINING,
        "uniform: each image once per epoch; balanced: each class equally often, so that images of "
        "small classes are repeated",
    )
    aug_repeats: Annotated[int, Field(ge=1)] = key(
        1,
        Affects.TRAINING,
        "times that an epoch contains each image it draws, augmented differently each time; the "
        "epoch keeps its length, so it draws fewer different images",
    )
    bad_samples: Annotated[Literal["error", "replace"], Word] = key(
        "error",
        Affects.TRAINING,
        "images that cannot be decoded; error: stop; replace: use the next good image",
    )
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = key(
        1 << 26,
        Affects.RUN,
        "larger images are refused: a small file may decode to gigabytes. At most 178956970, "
        "Pillow's limit",
        (*_READS_DATA, "predict", "serve"),
        needs="input_pipeline=own",
    )
    input_pipeline: Annotated[Literal["own", "mindspore"], Word] = key(
        "own",
        Affects.MODEL,
        "own: this program's, bit-identical on every number of ranks; mindspore: mindspore.dataset",
        ("train", "eval"),
    )
    num_parallel_workers: Annotated[int, Field(ge=0, le=256)] = key(
        0,
        Affects.PROCESS,
        "threads per rank that read images; 0: one per core of the rank",
        ("train", "eval", "predict", "report", *_SCRIPTS),
    )


class _Augmentation(_Keys):
    """Augmentation in training. Entries draw from random streams that depend only on seed, epoch,
    sample and entry; docs/recipes.md lists them"""

    augmentations: Specs = key(
        ["crop", "flip", "color_jitter"],
        Affects.TRAINING,
        "in order: crop, flip, color_jitter (strengths below), randaugment, random_erasing, mixup, "
        "cutmix; arguments as in 'mixup(alpha=0.2)'",
        _AUGMENTS,
    )
    progressive_size: Annotated[int, Field(ge=0)] = key(
        0,
        Affects.TRAINING,
        "side in pixels of training images in the first epochs, such as 128; in four stages it "
        "grows to image_size; 0: always image_size",
    )
    train_crop: Annotated[Literal["random_resized", "padded", "resize"], Word] = key(
        "random_resized",
        Affects.TRAINING,
        "random_resized: random area and aspect ratio; padded: resize, pad, crop at random; "
        "resize: only resize",
        _AUGMENTS,
        needs="augmentations=crop",
    )
    crop_scale: Interval = key(
        (0.08, 1.0),
        Affects.TRAINING,
        "random_resized: fraction of the image's area",
        _AUGMENTS,
        needs="train_crop=random_resized",
    )
    crop_ratio: Interval = key(
        (0.75, 1.333),
        Affects.TRAINING,
        "random_resized: width over height",
        _AUGMENTS,
        needs="train_crop=random_resized",
    )
    crop_padding: NonNegative = key(
        4, Affects.TRAINING, "padded: pixels on each side", _AUGMENTS, needs="train_crop=padded"
    )
    flip_probability: Probability = key(
        0.5,
        Affects.TRAINING,
        "probability of a horizontal flip",
        _AUGMENTS,
        needs="augmentations=flip",
    )
    color_jitter: Probabilities = key(
        (0.4, 0.4, 0.4),
        Affects.TRAINING,
        "strength of random brightness, contrast and saturation",
        _AUGMENTS,
        needs="augmentations=color_jitter",
    )


class _Preprocessing(_Keys):
    """Preprocessing in evaluation: resize, then crop the centre. Each network brings its own values
    of these keys"""

    eval_resize: NonNegative = key(0, Affects.MODEL, "pixels; 0: image_size / crop_pct")
    crop_pct: Annotated[float, Field(gt=0, le=1)] = key(0.875, Affects.MODEL, "see eval_resize")
    eval_resize_mode: Annotated[Literal["square", "shorter_side"], Word] = key(
        "square",
        Affects.MODEL,
        "square: resize both sides, like the MindSpore seeds; shorter_side: like torchvision, timm "
        "and ACNet",
    )
    interpolation: Annotated[Literal["bilinear", "bicubic"], Word] = key(
        "bilinear", Affects.MODEL, "bilinear, bicubic; in training too"
    )
    antialias: bool = key(
        False,
        Affects.MODEL,
        "1: average over all covered pixels, like Pillow, torchvision and timm; in training too",
    )
    reduced_decoding: Annotated[Literal["never", "train", "all"], Word] = key(
        "train",
        Affects.MODEL,
        "decode large JPEGs at 1/2, 1/4 or 1/8 of their sides: faster, and nearly the same; train: "
        "in training; all: in evaluation too",
        needs="antialias",
    )
    mean: Rgb = key((0.485, 0.456, 0.406), Affects.MODEL, "RGB mean, for pixels in [0, 1]")
    std: PositiveRgb = key((0.229, 0.224, 0.225), Affects.MODEL, "RGB standard deviation")


class _Device(_Keys):
    """Device"""

    device_target: Annotated[Literal["CPU", "GPU", "Ascend"], BeforeValidator(_device_name)] = key(
        "CPU", Affects.RUN, "CPU, GPU, Ascend"
    )
    device_id: NonNegative | None = key(
        None, Affects.PROCESS, "null: the rank's index on its machine"
    )
    run_distribute: bool | None = key(
        None, Affects.RUN, "1: require mpirun; 0: one process; null: either", ("train", "eval")
    )
    ranks: Annotated[Literal["auto"] | NonNegative, Word] = key(
        0,
        Affects.PROCESS,
        "ranks to launch on this machine (global batch unchanged); auto: one per core; 0: do not "
        "launch",
        ("train", "eval"),
    )
    threads: NonNegative = key(
        0,
        Affects.RUN,
        "cores per rank; 0: all available. Runs are bit-identical only with the same number",
    )
    stall_timeout_s: Annotated[float, Field(ge=1)] = key(
        1800.0,
        Affects.RUN,
        "abort the job if the other ranks wait longer than this for one rank",
        ("train", "eval"),
    )
    kernels: Annotated[Literal["auto", "onednn", "mindspore"], Word] = key(
        "auto",
        Affects.RUN,
        "on CPU; onednn: this program's kernels (scripts/setup.sh builds them); mindspore: "
        "MindSpore's own; auto: onednn if available",
    )
    amp_level: Annotated[Literal["auto", "O0", "O2", "O3"], BeforeValidator(_amp_level)] = key(
        "auto",
        Affects.GRAPH,
        "O0: float32; O2 and O3: convolutions and dense layers in float16 on GPU and Ascend; O2 on "
        "CPU: bfloat16; auto: O0 on CPU, else O3",
        ("train", "eval", "predict", "serve", "report"),
    )
    loss_scale: Annotated[float, Field(ge=1)] = key(
        1024.0, Affects.TRAINING, "for O2 and O3 on GPU and Ascend", needs="scales_loss"
    )
    is_dynamic_loss_scale: bool = key(
        False,
        Affects.TRAINING,
        "1: halve the loss scale when gradients overflow, double it after 2000 good steps",
        needs="scales_loss",
    )
    reducer: Annotated[str, Word] = key(
        "auto",
        Affects.RUN,
        "how GPU and Ascend average gradients; mpi: through the host; device: NCCL or HCCL; auto: "
        "device",
        _TRAIN,
        needs="device_target=GPU|Ascend",
    )
    gradient_compression: Annotated[Literal["none", "float16", "bfloat16"], Word] = key(
        "none",
        Affects.TRAINING,
        "float16, bfloat16: halves what ranks send over MPI; only worth it on slow networks",
    )
    compile_cache: bool = key(
        True,
        Affects.PROCESS,
        "on CPU, cache the compiled training graph in ~/.cache for the next run",
        _TRAIN,
    )


class _Optimization(_Keys):
    """Optimization"""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = key(
        1,
        Affects.TRAINING,
        "for weights, order, augmentation and val_split",
        ("train", "eval", "report", "preview_dataset"),
    )
    per_batch_size: Positive = key(
        128, Affects.BATCH, "images per rank and micro-batch", ("train", "eval", "report")
    )
    global_batch_size: NonNegative = key(
        0,
        Affects.BATCH,
        "images per step over all ranks, instead of per_batch_size; 0: use per_batch_size",
        _TRAIN,
    )
    fit_batch: bool = key(
        False,
        Affects.BATCH,
        "1: halve the batch until it fits in memory; and, above 8 images per rank, until an epoch "
        "has 10 steps",
        _TRAIN,
    )
    accumulation_steps: Positive = key(1, Affects.TRAINING, "micro-batches per step")
    max_epoch: Positive = key(150, Affects.TRAINING, "passes over the training images")
    max_steps: NonNegative = key(
        0, Affects.RUN, "stop after this many steps; 0: train for max_epoch", _TRAIN
    )
    dry_run: bool = key(
        False,
        Affects.RUN,
        "1: run three steps, estimate time and memory of the whole run, write nothing",
        _TRAIN,
    )
    optimizer: str = key(
        "momentum",
        Affects.TRAINING,
        "momentum, nesterov, lars, adamw; arguments as in 'adamw(beta2=0.95)'",
    )
    lr: PositiveReal = key(0.4, Affects.TRAINING, "learning rate after warm-up")
    lr_batch_size: NonNegative = key(
        0, Affects.TRAINING, "batch size that lr refers to (linear scaling rule); 0: no scaling"
    )
    lr_scheduler: Annotated[str, Word] = key(
        "cosine_annealing",
        Affects.TRAINING,
        "cosine_annealing, step (also: exponential, the model zoo's word), exponential_decay, "
        "one_cycle, cosine_restarts; arguments as in 'one_cycle(rise=0.2)'",
    )
    lr_interval: Annotated[Literal["epoch", "step"], Word] = key(
        "epoch",
        Affects.TRAINING,
        "when the learning rate changes: every epoch or every step",
        needs="lr_scheduler=cosine_annealing|cosine_restarts|exponential_decay",
    )
    warmup_epochs: NonNegativeReal = key(
        1.0,
        Affects.TRAINING,
        "epochs over which the learning rate rises linearly from 0",
        needs="lr_scheduler=cosine_annealing|cosine_restarts|exponential|exponential_decay|step",
    )
    T_max: NonNegativeReal = key(
        0.0,
        Affects.TRAINING,
        "cosine_annealing: epochs until eta_min, including warm-up; 0: max_epoch",
        needs="lr_scheduler=cosine_annealing",
    )
    eta_min: NonNegativeReal = key(
        0.0,
        Affects.TRAINING,
        "cosine_annealing, cosine_restarts: lowest learning rate",
        needs="lr_scheduler=cosine_annealing|cosine_restarts",
    )
    lr_epochs: Epochs = key(
        [30.0, 60.0, 90.0, 120.0],
        Affects.TRAINING,
        "step: epochs at which lr drops",
        needs="lr_scheduler=step|exponential",
    )
    lr_gamma: Annotated[float, Field(gt=0, le=1)] = key(
        0.1,
        Affects.TRAINING,
        "step: factor at each of lr_epochs; exponential_decay: per epoch",
        needs="lr_scheduler=step|exponential|exponential_decay",
    )
    momentum: Fraction = key(
        0.9,
        Affects.TRAINING,
        "for momentum, nesterov and lars",
        needs="optimizer=momentum|nesterov|lars",
    )
    weight_decay: NonNegativeReal = key(
        1e-4, Affects.TRAINING, "L2 coefficient; decoupled for adamw"
    )
    decay_norm_and_bias: bool = key(
        False,
        Affects.TRAINING,
        "1: weight decay for batch norm and biases too",
        needs="weight_decay",
    )
    bias_lr_factor: PositiveReal = key(
        1.0,
        Affects.TRAINING,
        "learning rate of biases and batch-norm offsets, relative to lr (ACNet's code: 2)",
    )
    clip_norm: NonNegativeReal = key(
        0.0,
        Affects.TRAINING,
        "maximum norm of the global gradient (all parameters, averaged over ranks); 0: no clipping",
    )
    ema_decay: Fraction = key(
        0.0,
        Affects.TRAINING,
        "decay of a moving average of the weights, such as 0.999; evaluation and deployment use "
        "the average; 0: none",
    )
    freeze_epochs: NonNegative = key(
        0,
        Affects.TRAINING,
        "number of initial epochs that train only the classifier; the backbone and its running "
        "statistics stay frozen",
    )
    backbone_lr_factor: PositiveReal = key(
        1.0, Affects.TRAINING, "learning rate of everything but the classifier, relative to lr"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = key(
        1.0,
        Affects.TRAINING,
        "layer-wise learning-rate decay: factor from each layer or residual block to the one "
        "before it; 1: none",
    )
    early_stopping: NonNegative = key(
        0,
        Affects.RUN,
        "stop after this many evaluations without improvement (top-1, then loss); 0: never",
        _TRAIN,
    )
    loss: Annotated[str, Word] = key(
        "cross_entropy",
        Affects.GRAPH,
        "cross_entropy, binary_cross_entropy; arguments as in "
        "'binary_cross_entropy(threshold=0.2)'",
    )
    class_weights: ClassWeights = key(
        "none",
        Affects.GRAPH,
        "weight of each class in the cross-entropy: balanced: the inverse of its number of images; "
        "or one number per class, as in 1,2.5,1; scaled to a mean of 1 over the training images",
    )
    teacher: str = key(
        "",
        Affects.TRAINING,
        "checkpoint to distil from (knowledge distillation), for the same classes and image size",
    )
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = key(
        0.5,
        Affects.TRAINING,
        "weight of the teacher's predictions in the targets; the labels have the rest",
        needs="teacher",
    )
    label_smooth_factor: Fraction = key(
        0.1, Affects.GRAPH, "fraction of the target spread over classes; 0: no label smoothing"
    )
    label_smooth_over: Annotated[Literal["others", "all"], Word] = key(
        "others",
        Affects.GRAPH,
        "others: spread over the other classes, like the model zoo; all: over all, like PyTorch",
        needs="label_smooth_factor",
    )


class _Output(_Keys):
    """Checkpoints, evaluation, output"""

    checkpoint_file_path: str = key(
        "",
        Affects.PROCESS,
        "checkpoint, or folder of checkpoints; train: weights to start from; also the name or "
        "address of published weights (--list), which are downloaded",
        (*_USES_MODEL, "preview_dataset"),
    )
    class_names: str = key(
        "",
        Affects.PROCESS,
        "text file with one class name per line, for weights without class names",
        ("eval", "predict", "serve"),
    )
    allow_head_mismatch: bool = key(
        False,
        Affects.RUN,
        "1: start from weights for other classes, with a new classifier",
        _TRAIN,
        needs="checkpoint_file_path",
    )
    run_eval: bool = key(
        False, Affects.RUN, "1: evaluate during training, keep the best as best.ckpt", _TRAIN
    )
    eval_interval: Positive = key(
        1, Affects.RUN, "epochs between evaluations", _TRAIN, needs="evaluates"
    )
    eval_engine: Annotated[Literal["auto", "mindspore", "onnx"], Word] = key(
        "auto",
        Affects.RUN,
        "mindspore; onnx: onnxruntime; auto: mindspore if it has the fast kernels, else onnx if "
        "installed; serve: the faster",
        ("eval", "predict", "serve", "report"),
    )
    output_path: str = key(
        "outputs", Affects.PROCESS, "each run creates a dated folder in it", _TRAIN
    )
    ckpt_interval: Positive = key(
        5, Affects.RUN, "epochs between checkpoints; the last epoch is always saved", _TRAIN
    )
    ckpt_interval_steps: NonNegative = key(
        0, Affects.RUN, "additional checkpoint every this many steps; 0: none", _TRAIN
    )
    resume: Annotated[str, BeforeValidator(_resume)] = key(
        "",
        Affects.RUN,
        "run to continue: its folder or one of its checkpoints; auto, or a bare --resume: the "
        "newest under output_path",
        _TRAIN,
    )
    keep_checkpoint_max: Positive = key(
        5, Affects.PROCESS, "number of checkpoints to keep; older ones are deleted", _TRAIN
    )
    deploy: Annotated[Literal["best"] | bool, Word] = key(
        False,
        Affects.RUN,
        "1: after training fuse the network and evaluate both forms (needs validation images); "
        "best: use best.ckpt",
        _TRAIN,
    )
    tensorboard: bool = key(
        False,
        Affects.PROCESS,
        "1: also write TensorBoard event files (scripts/setup.sh --tensorboard)",
        _TRAIN,
    )
    log_interval: Positive = key(
        50,
        Affects.PROCESS,
        "steps between log lines without a terminal; there is also a line every 10 s",
        _TRAIN,
    )
    result_path: str = key(
        "",
        Affects.PROCESS,
        "output file; for results .json, and for predict also .jsonl or .csv",
        ("eval", "predict", "export", "report", *_SCRIPTS),
    )
    top_k: Positive = key(5, Affects.PROCESS, "number of classes to show", ("predict", "serve"))
    unsure: Fraction = key(
        0.0,
        Affects.PROCESS,
        "mark predictions whose top class has a lower probability than this, such as 0.6; 0: none",
        ("predict", "serve"),
    )
    test_flip: bool = key(
        False,
        Affects.RUN,
        "1: average over the image and its mirror image, at twice the time",
        ("eval", "predict", "serve"),
    )
    file_format: Annotated[str, BeforeValidator(_upper)] = key(
        "CKPT",
        Affects.RUN,
        "CKPT, MINDIR, ONNX, SAFETENSORS (with torchvision's names)",
        ("export",),
    )
    onnx_preprocessing: bool = key(
        False,
        Affects.RUN,
        "1: the ONNX file resizes, crops and normalises images itself; it takes uint8 RGB of any "
        "size",
        ("export",),
    )
    quantize: Annotated[Literal["none", "int8"], Word] = key(
        "none",
        Affects.RUN,
        "int8: also write 8-bit ONNX and compare accuracy and speed; needs training images",
        ("export",),
    )
    calibration_images: Positive = key(
        128,
        Affects.RUN,
        "number of training images to calibrate quantize with",
        ("export",),
        needs="quantize=int8",
    )
    temperature: Annotated[Literal["auto"] | PositiveReal, Word] = key(
        1.0,
        Affects.RUN,
        "divide the logits by this number to calibrate the probabilities; auto: fit it on the "
        "validation images",
        ("export",),
    )
    fuse: bool = key(True, Affects.RUN, "fuse blocks into plain convolutions", ("export",))
    strict: bool = key(False, Affects.RUN, "1: treat warnings as errors")
    host: str = key(
        "127.0.0.1",
        Affects.PROCESS,
        "address to listen on; 0.0.0.0 accepts other machines",
        ("serve",),
    )
    port: Annotated[int, Field(ge=0, le=65535)] = key(
        8000, Affects.PROCESS, "port to listen on; 0: any free port", ("serve",)
    )
    heat_maps: Annotated[int, Field(ge=0)] = key(
        12,
        Affects.PROCESS,
        "number of mistakes that the report shows with an occlusion heat map; 0: none",
        ("report",),
    )
    save_figure: str = key(
        "",
        Affects.PROCESS,
        "PNG file for a sheet of the images and their predictions",
        ("predict",),
    )


GROUPS = (_Network, _Data, _Augmentation, _Preprocessing, _Device, _Optimization, _Output)


# pydantic lists the fields of the last base first.
class Config(_Output, _Optimization, _Device, _Preprocessing, _Augmentation, _Data, _Network):
    """One resolved configuration. It never changes."""

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={list(self.crop_scale)} must be two rising fractions of the area in "
                "(0, 1]"
            )
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean={list(self.mean)} must be in [0, 1], as pixels / 255 are")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(
                f"crop_ratio={list(self.crop_ratio)} must be two rising positive numbers"
            )
        if self.eta_min > self.lr:
            raise ValueError(
                f"eta_min={self.eta_min:g} must not be above lr={self.lr:g}, from which the "
                "learning rate falls to it"
            )
        if any(later <= earlier for earlier, later in zip(self.lr_epochs, self.lr_epochs[1:])):
            raise ValueError(f"lr_epochs={self.lr_epochs} must be rising")
        if self.quantize != "none" and self.file_format != "ONNX":
            raise ValueError(f"quantize={self.quantize} writes ONNX: add --file_format=ONNX")
        if self.onnx_preprocessing and self.file_format != "ONNX":
            raise ValueError("onnx_preprocessing=1 writes ONNX: add --file_format=ONNX")
        if self.onnx_preprocessing and self.quantize != "none":
            raise ValueError("onnx_preprocessing=1 and quantize exclude each other: export twice")
        return self

    @property
    def resized_side(self) -> int:
        """Side in pixels that evaluation resizes to before the centre crop.

        Rounded down, as in timm (timm/data/transforms_factory.py).
        """
        return self.eval_resize or math.floor(self.image_size / self.crop_pct)

    @property
    def smoothing(self) -> float:
        """Label smoothing e in effect: the target is (1 - e) one-hot + e / num_classes.

        A fraction f spread over the other classes leaves 1 - f to the true class:
        e = f num_classes / (num_classes - 1).
        """
        fraction, classes = self.label_smooth_factor, self.num_classes
        if self.label_smooth_over == "others" and classes > 1:
            return fraction * classes / (classes - 1)
        return fraction

    @property
    def evaluates(self) -> bool:
        """Whether training evaluates on validation images."""
        return bool(self.run_eval or self.val_split)

    @property
    def precision(self) -> str:
        """amp_level in effect; "auto": O0 (float32) on CPU, O3 on devices as in the model zoo.

        O2 and O3 mean the same here.
        """
        if self.amp_level != "auto":
            return self.amp_level
        return "O0" if self.device_target == "CPU" else "O3"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a loss scale: those of float16 do, those of bfloat16 do not."""
        return self.compute_type == "float16"

    @property
    def compute_type(self) -> str:
        """The type of activations: "float32", "float16" or, on CPU, "bfloat16"."""
        if self.precision == "O0":
            return "float32"
        return "bfloat16" if self.device_target == "CPU" else "float16"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def key_info(name: str) -> KeyInfo:
    """The KeyInfo of a key."""
    extra: Any = Config.model_fields[name].json_schema_extra
    return extra["info"]


def keys_affecting(*effects: Affects) -> set[str]:
    """The keys that affect one of ``effects``."""
    return {name for name in Config.model_fields if key_info(name).affects in effects}


def default_values() -> dict[str, Any]:
    """{key: default}, JSON-serialisable."""
    return Config().model_dump(mode="json")


def validated(values: Mapping[str, Any]) -> Config:
    """A Config of the defaults and {key: value}. Raises UserError that names the first bad key."""
    for name, value in values.items():
        field = Config.model_fields.get(name)
        kind = type_text(field.annotation) if field is not None else "0|1"
        if isinstance(value, bool) and ("INT" in kind or "NUMBER" in kind):
            raise UserError(f"{name}={value}: must be a number")
    try:
        return Config(**values)
    except ValidationError as failure:
        first = failure.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            near = suggestion(name, Config.model_fields)
            raise UserError(f"unknown key '{name}'{near}") from None
        # A key that takes one of two types has an error for each.
        reasons = [
            error["msg"][0].lower() + error["msg"][1:]
            for error in failure.errors()
            if error["loc"][:1] == first["loc"][:1]
            and all(isinstance(part, str) for part in error["loc"])
        ]
        reason = " or ".join(reasons) if len(reasons) > 1 else first["msg"]
        reason = reason.removeprefix("Value error, ")
        if first["type"] == "missing":
            reason = f"needs {len(get_args(Config.model_fields[name].annotation))} numbers"
        given = f"{name}={first['input']}: " if name else ""
        raise UserError(f"{given}{reason[0].lower() + reason[1:]}") from None


def type_text(annotation: object) -> str:
    """The type of a key as help shows it, or the words that the key takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (list, tuple):
        return "LIST"
    if arguments:
        texts = [type_text(argument) for argument in arguments if argument is not type(None)]
        return "|".join(dict.fromkeys(texts)) + ("|null" if type(None) in arguments else "")
    names: dict[object, str] = {bool: "0|1", int: "INT", float: "NUMBER", str: "TEXT"}
    return names.get(annotation, "TEXT")


def default_text(name: str) -> str:
    """The default of a key as default_config.yaml writes it."""
    return _yaml_text(Config.model_fields[name].default)


def _yaml_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        # YAML reads 1e-4 as a string; it needs a point.
        return f"{value:g}" if "e" not in f"{value:g}" else f"{value:.1e}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml_text, value))}]"
    if value is None:
        return "null"
    return f"'{value}'" if value == "" else str(value)


_WIDTH, _COLUMN = 100, 30


def default_yaml() -> str:
    """The text of default_config.yaml."""
    lines = [
        "# Every key with its default: the ResNeXt50_32x4d ImageNet recipe. Each key is also a",
        "# flag (--lr=0.1), and flags win. Generated by `python3 -m src.cli.config`; do not edit:",
        "# put your own values into a recipe, as in configs/, and pass --config_path=FILE.",
    ]
    for group in GROUPS:
        heading = " ".join((group.__doc__ or "").split())
        lines += [
            "",
            *textwrap.wrap(f"{heading}.", _WIDTH - 2, initial_indent="# ", subsequent_indent="# "),
        ]
        for name in group.model_fields:
            entry = f"{name}: {default_text(name)}"
            comment = textwrap.wrap(key_info(name).help, _WIDTH - _COLUMN - 2)
            if len(entry) < _COLUMN:
                lines.append(f"{entry:<{_COLUMN}}# {comment.pop(0)}")
                lines += [f"{'':<{_COLUMN}}# {part}" for part in comment]
            else:
                lines += [f"{'':<{_COLUMN}}# {part}" for part in comment]
                lines.append(entry)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(default_yaml(), end="")
