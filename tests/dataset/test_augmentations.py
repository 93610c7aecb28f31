"""Augmentations: an ordered list; an entry's randomness depends on (seed, epoch, sample) alone."""

import math

import numpy as np
import pytest
from conftest import make_config
from PIL import Image

from src.dataset.augmentations import (
    AUGMENTATIONS,
    OPERATIONS,
    Augmenter,
    CutMix,
    Flip,
    Mixup,
    RandAugment,
    RandomErasing,
    check_augmentations,
    sample_generator,
)
from src.dataset.batches import TrainBatches
from src.dataset.image_set import ImageSet
from src.dataset.sources import open_images
from src.utils.errors import UserError

EVERYTHING = "crop, flip, color_jitter, randaugment, random_erasing, mixup, cutmix"


def random_image(size=(40, 48), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def augmented(entries, key=(1, 2, 3), image=None, **values):
    """The image that sample ``key`` = (seed, epoch, index) of a list of entries becomes."""
    seed, epoch, index = key
    config = make_config(augmentations=entries, seed=seed, **{"image_size": 32, **values})
    image = random_image() if image is None else image
    return Augmenter(config, 10, 4).sample(
        lambda sample: (np.roll(image, sample, axis=0), sample % 4), epoch, index
    )


@pytest.mark.parametrize("entries", [*AUGMENTATIONS, EVERYTHING])
def test_each_is_a_function_of_seed_epoch_and_sample(entries):
    image, target = augmented(entries)
    again, same = augmented(entries)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert np.array_equal(image, again) and np.array_equal(target, same)
    many = [augmented(entries, key)[0] for key in [(s, e, 3) for s in range(4) for e in range(4)]]
    assert any(not np.array_equal(image, other) for other in many)


@pytest.mark.parametrize("interval", ["scale=(0.5, 0.1)", "ratio=(3, 0.3)", "ratio=(-1, 0.3)"])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(UserError, match=f"random_erasing\\({interval[:5]}"):
        augmented(f"random_erasing(probability=1, {interval})")


def test_switching_one_on_does_not_shift_the_draws_of_another():
    def flips(entries):
        image = np.zeros((32, 32, 3), np.uint8)
        image[:, :16] = 255
        # Flipped or not shows in the mean of the left half, whatever else happens to the pixels.
        return [
            augmented(entries, (1, 0, index), image, train_crop="resize")[0][:, :16].mean() > 100
            for index in range(64)
        ]

    alone = flips("flip")
    assert 15 < sum(alone) < 49
    assert (
        flips("crop, flip")
        == flips("flip, color_jitter")
        == flips("color_jitter, flip, random_erasing(scale=(0.02, 0.03))")
        == alone
    )


def test_the_same_entry_twice_has_two_streams():
    once = [augmented("flip", (1, 0, index), train_crop="resize")[0] for index in range(32)]
    twice = [augmented("flip, flip", (1, 0, index), train_crop="resize")[0] for index in range(32)]
    # With one stream the second flip would always undo the first.
    assert any(not np.array_equal(a, b) for a, b in zip(once, twice))


def test_entries_act_in_their_order():
    erased_last = augmented("color_jitter, random_erasing(probability=1)", train_crop="resize")[0]
    erased_first = augmented("random_erasing(probability=1), color_jitter", train_crop="resize")[0]
    assert not np.array_equal(erased_last, erased_first)


@pytest.mark.parametrize("entries", ["crop, flip, color_jitter", EVERYTHING])
def test_pixels_and_targets_do_not_depend_on_ranks_threads_or_batches(entries):
    images = open_images("digits", "train")

    def batches(ranks, threads, **values):
        config = make_config(
            config_path="digits",
            global_batch_size=12,
            max_epoch=1,
            num_parallel_workers=threads,
            augmentations=entries,
            **values,
        )
        return [TrainBatches(images, config, rank, ranks)[0] for rank in range(ranks)]

    (alone,), three = batches(1, 1), batches(3, 2)
    assert np.array_equal(alone.images, np.stack([three[i % 3].images[i // 3] for i in range(12)]))
    assert np.array_equal(alone.labels, np.stack([three[i % 3].labels[i // 3] for i in range(12)]))
    (parts,) = batches(1, 2, accumulation_steps=2)
    assert np.array_equal(alone.images[:6], parts.images)


def test_targets_of_mixed_samples_are_distributions():
    pixels = np.repeat(np.arange(40, dtype=np.uint8), 32 * 32 * 3).reshape(40, 32, 32, 3)
    images = ImageSet(
        {str(i): i for i in range(4)}, np.arange(40, dtype=np.int32) % 4, pixels=pixels
    )
    config = make_config(
        augmentations="mixup(alpha=1.0), cutmix",
        image_size=32,
        per_batch_size=40,
        max_epoch=1,
        num_classes=4,
    )
    batch = TrainBatches(images, config, 0, 1)[0]
    assert batch.labels.shape == (40, 4) and batch.labels.dtype == np.float32
    assert np.allclose(batch.labels.sum(axis=1), 1, atol=1e-6) and batch.labels.min() >= 0
    assert ((batch.labels > 0.01).sum(axis=1) > 1).sum() > 10


def test_mixup_is_the_weighted_mean_of_images_and_targets():
    image, other = np.full((8, 8, 3), 200, np.uint8), np.full((8, 8, 3), 100, np.uint8)
    first, second = np.eye(2, dtype=np.float32)
    weights = []
    for index in range(2000):
        mixed, target = Mixup(alpha=0.4).mix(
            image, first, sample_generator(0, 0, index), lambda: (other, second)
        )
        assert abs(int(mixed[0, 0, 0]) - (200 * target[0] + 100 * target[1])) <= 0.51
        weights.append(target[0])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert np.mean(weights) == pytest.approx(0.5, abs=0.03) and np.var(weights) == pytest.approx(
        1 / (4 * 1.8), rel=0.06
    )


def test_cutmix_weighs_targets_by_the_area_that_is_seen():
    image, other = np.zeros((20, 30, 3), np.uint8), np.full((20, 30, 3), 255, np.uint8)
    first, second = np.eye(2, dtype=np.float32)
    for index in range(200):
        mixed, target = CutMix().mix(
            image, first, sample_generator(0, 0, index), lambda: (other, second)
        )
        assert (mixed[:, :, 0] == 255).mean() == pytest.approx(target[1], abs=1e-6)
        rows, columns = np.where(mixed[:, :, 0] == 255)
        if len(rows):  # one rectangle
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert not image.any()


def test_mixing_may_leave_samples_alone():
    image, target = random_image(), np.eye(2, dtype=np.float32)[0]
    for kind in (Mixup, CutMix):
        mixed, same = kind(probability=0.0).mix(
            image, target, sample_generator(0, 0, 0), lambda: pytest.fail("drawn")
        )
        assert mixed is image and same is target


def test_erased_parts_have_the_papers_area_and_aspect():
    image = np.full((100, 200, 3), 7, np.uint8)
    erased = [RandomErasing()(image, sample_generator(0, 0, index)) for index in range(1000)]
    parts = []
    for one in erased:
        rows, columns = np.where((one != 7).any(axis=2))
        if len(rows):
            parts.append((np.ptp(rows) + 1, np.ptp(columns) + 1))
    assert len(parts) == pytest.approx(500, abs=4 * math.sqrt(250))
    areas, aspects = (
        np.array([h * w / 20_000 for h, w in parts]),
        np.array([h / w for h, w in parts]),
    )
    assert (
        areas.min() > 0.015 and areas.max() < 0.41 and aspects.min() > 0.25 and aspects.max() < 3.7
    )
    assert (image == 7).all()


def test_randaugment_draws_its_operations_uniformly_and_obeys_its_magnitude(monkeypatch):
    counts, strengths = np.zeros(len(OPERATIONS)), []

    def counting(index):
        def operation(picture, strength):
            counts[index] += 1
            strengths.append(strength)
            return picture

        return operation

    monkeypatch.setattr(
        "src.dataset.augmentations.OPERATIONS", tuple(map(counting, range(len(OPERATIONS))))
    )
    for index in range(1000):
        RandAugment(layers=3, magnitude=15)(random_image((8, 8)), sample_generator(0, 0, index))
    assert counts.sum() == 3000 and np.abs(counts - 3000 / 14).max() < 4 * math.sqrt(3000 / 14)
    assert set(strengths) == {0.5, -0.5} and abs(sum(strengths)) < 0.5 * 4 * math.sqrt(3000)


def test_operations_of_randaugment_do_little_at_strength_zero():
    picture = Image.fromarray(random_image((32, 32)))
    unchanged = [
        np.array_equal(np.asarray(operation(picture, 0.0)), np.asarray(picture))
        for operation in OPERATIONS
    ]
    # Equalise and autocontrast have no strength; solarising at 256 and posterising to 8 bits change
    # nothing.
    assert unchanged[:12] == [True] * 12
    changed = [
        np.array_equal(np.asarray(operation(picture, 1.0)), np.asarray(picture))
        for operation in OPERATIONS
    ]
    assert changed[:12] == [True] + [False] * 11


@pytest.mark.parametrize(
    "text,message",
    [
        ("crop, mixupp", "did you mean 'mixup'"),
        ("crop, mixup(alpha=0)", r"mixup\(alpha=0\): input should be greater"),
        ("crop, mixup(beta=1)", "mixup takes no argument 'beta'"),
        ("crop, mixup(alpha=", "neither a name nor"),
    ],
)
def test_a_wrong_entry_is_named(text, message):
    with pytest.raises(UserError, match=message):
        check_augmentations(make_config(augmentations=text))


def test_flip_probability():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 0] = 255
    flip = Flip(probability=0.5)
    flipped = sum(
        flip(image, sample_generator(0, 0, index))[0, 7, 0] == 255 for index in range(2000)
    )
    assert abs(flipped - 1000) < 4 * math.sqrt(500)


def test_a_crop_after_cutmix_is_refused():
    """It may cut off the pasted part, whose class the target counts all the same."""
    with pytest.raises(UserError, match="list cutmix after crop"):
        check_augmentations(make_config(augmentations="cutmix, flip, crop"))
    check_augmentations(make_config(augmentations="mixup, crop, flip, cutmix"))
    check_augmentations(make_config(augmentations="cutmix, crop", train_crop="resize"))
