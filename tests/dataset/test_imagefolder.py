"""mindspore.dataset as the input pipeline: the same images, each once, for any number of ranks."""

import shutil

import cv2
import numpy as np
import pytest
from conftest import ROOT, execute, make_config
from PIL import Image

from src.dataset.batches import PADDING_LABEL, EvalBatches, TrainBatches, prefetch
from src.dataset.imagefolder import MindSporeEvalBatches, MindSporeTrainBatches, create_dataset
from src.dataset.sources import open_images
from src.utils.errors import UserError

KEYS = {"image_size": 32, "crop_pct": 0.8, "num_parallel_workers": 2, "max_epoch": 2}


@pytest.fixture
def photographs(tmp_path):
    """40 JPEG files of several sizes in three class folders."""
    random = np.random.default_rng(0)
    for index in range(40):
        folder = tmp_path / ("ant", "bee", "bee", "cow")[index % 4]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = random.integers(40, 90, 2)
        small = random.integers(0, 256, (6, 5, 3), np.uint8)
        cv2.imwrite(str(folder / f"{index}.jpg"), cv2.resize(small, (int(width), int(height))))
    return tmp_path


def assert_same(own, other, tolerance):
    for expected, found in zip(prefetch(own), prefetch(other), strict=True):
        assert np.array_equal(expected.labels, found.labels)
        difference = np.abs(expected.images.astype(int) - found.images)
        assert difference.max() <= tolerance, difference.max()


def test_evaluation_sees_the_images_of_the_own_pipeline(photographs):
    """Each once, on three ranks: 14, 13 and 13 images, in batches of 4 with padding."""
    images = open_images(photographs, "val")
    config = make_config(eval_resize_mode="square", **KEYS)
    labels = []
    for rank in range(3):
        other = MindSporeEvalBatches(images, config, rank, 3, 4)
        assert_same(EvalBatches(images, config, rank, 3, 4), other, tolerance=1)
        labels += [batch.labels for batch in prefetch(other)]
    labels = np.concatenate(labels)
    assert np.bincount(labels[labels != PADDING_LABEL]).tolist() == [10, 20, 10]


def test_the_shorter_side_is_resized_to_a_pixel(photographs):
    """MindSpore rounds the longer side up where torchvision and this program round it down."""
    images = open_images(photographs, "val")
    config = make_config(eval_resize_mode="shorter_side", **KEYS)
    own, other = (kind(images, config, 0, 1, 40) for kind in (EvalBatches, MindSporeEvalBatches))
    assert np.abs(own[0].images.astype(int) - other[0].images).mean() < 2


def test_training_steps_have_the_images_of_the_own_pipeline(photographs):
    images = open_images(photographs, "train")
    config = make_config(
        train_crop="resize", augmentations="crop", global_batch_size=6, accumulation_steps=1, **KEYS
    )
    for rank in range(2):
        own, other = (
            kind(images, config, rank, 2) for kind in (TrainBatches, MindSporeTrainBatches)
        )
        assert len(own) == 12
        assert_same(own, other, tolerance=1)
        # A resumed run begins in the middle of an epoch.
        assert np.array_equal(next(prefetch(other, 4)).images, other[4].images)


def test_augmentations_differ_between_epochs(photographs):
    images = open_images(photographs, "train")
    config = make_config(per_batch_size=40, flip_probability=0.5, **KEYS)
    source = MindSporeTrainBatches(images, config, 0, 1)
    first, second = source[0], source[1]
    assert first.images.shape == (40, 32, 32, 3) and first.images.dtype == np.uint8
    order = np.argsort(source.samples(0)[0]), np.argsort(source.samples(1)[0])
    assert np.array_equal(first.labels[order[0]], second.labels[order[1]])
    assert np.abs(first.images[order[0]].astype(int) - second.images[order[1]]).mean() > 5


def test_shards_of_create_dataset_together_are_the_data_set(photographs):
    config = make_config(per_batch_size=5, **KEYS)
    labels = []
    for shard in range(2):
        dataset = create_dataset(str(photographs), config, False, num_shards=2, shard_id=shard)
        for image, label in dataset.create_tuple_iterator(num_epochs=1, output_numpy=True):
            assert image.shape == (5, 3, 32, 32) and image.dtype == np.float32
            labels += label.tolist()
    assert np.bincount(labels).tolist() == [10, 20, 10]


def test_normalisation_is_that_of_the_recipe(photographs):
    config = make_config(per_batch_size=40, mean="0.5,0.4,0.3", std="0.2,0.3,0.4", **KEYS)
    dataset = create_dataset(str(photographs), config, training=False)
    (image, _), *_ = dataset.create_tuple_iterator(num_epochs=1, output_numpy=True)
    pixels = EvalBatches(open_images(photographs, "val"), config, 0, 1, 40)[0].images / 255
    expected = (pixels - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    assert np.abs(image - expected.transpose(0, 3, 1, 2)).max() < 0.03


@pytest.mark.parametrize(
    "keys,message",
    [
        ({"augmentations": "crop,randaugment"}, "not randaugment"),
        ({"bad_samples": "replace"}, "bad_samples=replace needs --input_pipeline=own"),
        ({"antialias": 1}, "cannot antialias"),
    ],
)
def test_what_mindspore_does_not_have_is_refused(photographs, keys, message):
    images = open_images(photographs, "train")
    with pytest.raises(UserError, match=message):
        MindSporeTrainBatches(images, make_config(per_batch_size=4, **keys, **KEYS), 0, 1)


@pytest.mark.parametrize("name", ["x.webp", "brown/x.jpg", "x.gif"])
def test_a_file_that_mindspore_does_not_read_is_named(photographs, name):
    (photographs / "cow" / "brown").mkdir()
    Image.new("RGB", (9, 9)).save(photographs / "cow" / name)
    images = open_images(photographs, "train")
    with pytest.raises(UserError, match=f"{name}.*--input_pipeline=own"):
        MindSporeTrainBatches(images, make_config(per_batch_size=4, **KEYS), 0, 1)


def test_a_damaged_image_is_named(photographs):
    (photographs / "ant" / "0.jpg").write_bytes(b"no picture")
    images = open_images(photographs, "val")
    with pytest.raises(UserError, match="ant/0.jpg"):
        list(prefetch(MindSporeEvalBatches(images, make_config(**KEYS), 0, 1, 4)))


@pytest.mark.slow
def test_train_and_evaluate(tmp_path):
    shutil.copytree(ROOT / "data" / "digits", tmp_path / "digits")
    flags = ["--config_path=digits", "--input_pipeline=mindspore", f"--data_path={tmp_path}/digits"]
    run = execute(
        ["python3", "train.py", *flags, "--max_epoch=6", "--run_eval=1", "--deploy=0"]
        + [f"--output_path={tmp_path}/out"]
    )
    assert run.status == 0, run
    (folder,) = tmp_path.glob("out/*/ckpt_0")
    accuracies = []
    for pipeline in ("own", "mindspore"):
        run = execute(
            ["python3", "eval.py", f"--checkpoint_file_path={folder}"]
            + [f"--data_path={tmp_path}/digits", f"--input_pipeline={pipeline}"]
        )
        assert run.status == 0, run
        accuracies.append(float(run.out.rsplit("top1=", 1)[1].split(",")[0]))
    assert accuracies[0] == accuracies[1] > 90, accuracies
