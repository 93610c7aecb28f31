"""Batches: the same global batch for every number of ranks, each image once in evaluation."""

import shutil
import time

import numpy as np
import pytest
from conftest import make_config, write_image_folder

from src.dataset.batches import (
    PADDING_LABEL,
    EvalBatches,
    TrainBatches,
    balanced_order,
    epoch_order,
    global_batch_size,
    micro_batch_size,
    prefetch,
    training_size,
)
from src.dataset.image_set import ImageSet
from src.dataset.sources import open_images
from src.utils.errors import UserError


@pytest.fixture
def numbered():
    """70 images whose pixels and labels are their index."""
    pixels = np.broadcast_to(np.arange(70, dtype=np.uint8)[:, None, None, None], (70, 8, 8, 3))
    return ImageSet({str(i): i for i in range(70)}, np.arange(70, dtype=np.int32), pixels=pixels)


def plain(**values):
    return make_config(
        image_size=8, train_crop="resize", flip_probability=0, color_jitter="0,0,0", **values
    )


def served(images, config, ranks, first=0):
    """Labels of each global batch, over all ranks."""
    sources = [TrainBatches(images, config, rank, ranks) for rank in range(ranks)]
    return [
        np.sort(np.concatenate([batch.labels for batch in batches]))
        for batches in zip(*(prefetch(s, first) for s in sources))
    ]


def test_balanced_epochs_have_each_class_equally_often():
    """30 dogs, 3 birds, 1 food: 12 or 11 of each in 34 draws, every bird 3 or 4 times."""
    labels = np.repeat([0, 1, 2], [30, 3, 1])
    orders = [balanced_order(1, epoch, labels) for epoch in range(30)]
    for order in orders:
        assert sorted(np.bincount(labels[order])) == [11, 11, 12]
        times = np.bincount(order, minlength=34)
        assert set(times[30:33]) <= {3, 4} and times[:30].max() == 1
    # Over the epochs each dog is seen about equally often, and the order changes.
    seen = np.bincount(np.concatenate(orders), minlength=34)[:30]
    assert seen.min() > 2 and seen.max() < 24 and seen.sum() == pytest.approx(340, abs=5)
    assert not np.array_equal(orders[0], orders[3])
    # No class stands at the beginning.
    firsts = np.concatenate([labels[order[:12]] for order in orders])
    assert np.bincount(firsts).min() > 90


@pytest.mark.parametrize(
    "first,last,epochs,sizes",
    [
        (128, 224, 9, [128] * 3 + [160] * 2 + [192] * 2 + [224] * 2),
        (16, 32, 4, [16, 24, 24, 32]),
        (30, 33, 4, [30, 32, 32, 33]),
        (0, 224, 3, [224] * 3),
    ],
)
def test_training_images_grow_in_four_stages(first, last, epochs, sizes):
    config = make_config(image_size=last, progressive_size=first, max_epoch=epochs)
    assert [training_size(config, epoch) for epoch in range(epochs)] == sizes


@pytest.mark.parametrize("augmentations", ["crop, flip, color_jitter", "crop, cutmix(alpha=1)"])
@pytest.mark.parametrize("crop", ["padded", "random_resized"])
def test_smaller_images_are_those_of_a_smaller_image_size(tmp_path, crop, augmentations):
    write_image_folder(tmp_path, "train", ("ant", "bee"), 4, size=(50, 70))
    images = open_images(str(tmp_path / "train"), "train")
    keys = {"train_crop": crop, "augmentations": augmentations, "max_epoch": 4, "per_batch_size": 8}
    source = TrainBatches(
        images, make_config(image_size=32, progressive_size=16, **keys), rank=0, size=1
    )
    for number, size in enumerate([16, 24, 24, 32]):
        alone = TrainBatches(images, make_config(image_size=size, **keys), rank=0, size=1)[number]
        batch = source[number]
        assert batch.images.shape == (8, size, size, 3)
        assert np.array_equal(batch.images, alone.images)
        assert np.array_equal(batch.labels, alone.labels)


@pytest.mark.parametrize("side,is_kept", [(128, True), (129, False)])
def test_small_images_are_decoded_once(tmp_path, side, is_kept):
    """The second epoch has the pixels of the files, which are gone by then."""
    write_image_folder(tmp_path, "train", ("ant", "bee"), 4, size=(side, side))
    images = open_images(str(tmp_path / "train"), "train")
    mixed = "crop, flip, color_jitter, mixup(alpha=0.2)"
    config = make_config(image_size=32, per_batch_size=8, max_epoch=2, augmentations=mixed)
    expected = TrainBatches(images, config, 0, 1)[1]
    source = TrainBatches(images, config, 0, 1)
    source[0]
    shutil.rmtree(tmp_path)
    if is_kept:
        assert np.array_equal(source[1].images, expected.images)
        assert np.array_equal(source[1].labels, expected.labels)
    else:
        with pytest.raises(UserError):
            source[1]


def test_a_repeated_image_is_augmented_otherwise():
    """A class of one image and one of five: the one is cropped six times in two epochs."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 16, 16, 3), np.uint8)
    labels = np.array([0] * 5 + [1], np.int32)
    images = ImageSet({"a": 0, "b": 1}, labels, pixels=pixels)
    keys = {"image_size": 8, "per_batch_size": 6, "max_epoch": 2, "sampling": "balanced"}
    source = TrainBatches(images, make_config(**keys), 0, 1)
    batches = [source[0], source[1]]
    seen = [i for b in batches for i, label in zip(b.images, b.labels) if label == 1]
    assert len(seen) == 6 and len({image.tobytes() for image in seen}) == 6
    # The first time it is augmented as without repetition.
    uniform = TrainBatches(images, make_config(**{**keys, "sampling": "uniform"}), 0, 1)
    place = source.samples(0)[0].tolist().index(5)
    (other,) = np.flatnonzero(uniform.samples(0)[0] == 5)
    assert np.array_equal(batches[0].images[place], uniform[0].images[other])


def test_repeated_augmentation_has_each_image_three_times_and_augments_it_otherwise():
    """Hoffer et al., arXiv:1901.09335, with timm's length of an epoch: 8 of 24 images."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    images = ImageSet({"a": 0}, np.zeros(24, np.int32), pixels=pixels)
    keys = {"image_size": 8, "per_batch_size": 12, "max_epoch": 2}
    source = TrainBatches(images, make_config(**keys, aug_repeats=3), 0, 1)
    used = [np.concatenate([source.samples(n)[0] for n in epoch]) for epoch in ((0, 1), (2, 3))]
    for indices in used:
        assert np.bincount(indices, minlength=24).tolist() == [
            3 * (i in indices) for i in range(24)
        ]
    assert set(used[0]) != set(used[1])
    batch = source[0]
    assert len({image.tobytes() for image in batch.images}) == 12
    # The first of the three is what it is without repetition.
    once = TrainBatches(images, make_config(**keys), 0, 1)
    index = source.samples(0)[0][0]
    number, place = divmod(
        np.concatenate([once.samples(n)[0] for n in (0, 1)]).tolist().index(index), 12
    )
    assert np.array_equal(batch.images[0], once[number].images[place])


def test_repeated_augmentation_is_the_same_on_any_number_of_ranks(numbered):
    config = plain(global_batch_size=12, max_epoch=2, aug_repeats=4)
    alone = served(numbered, config, 1)
    assert all(np.array_equal(a, b) for a, b in zip(alone, served(numbered, config, 3)))


def test_balanced_training_is_the_same_on_any_number_of_ranks(numbered):
    config = plain(global_batch_size=12, max_epoch=2, sampling="balanced")
    alone = served(numbered, config, 1)
    assert all(np.array_equal(a, b) for a, b in zip(alone, served(numbered, config, 3)))


def test_global_batches_are_the_same_for_every_number_of_ranks(numbered):
    alone = served(numbered, plain(global_batch_size=12, max_epoch=3), 1)
    assert len(alone) == 3 * (70 // 12)
    for ranks in (2, 3, 4):
        other = served(numbered, plain(global_batch_size=12, max_epoch=3), ranks)
        assert all(np.array_equal(a, b) for a, b in zip(alone, other))


def test_accumulation_splits_the_same_global_batch(numbered):
    whole = served(numbered, plain(global_batch_size=12, max_epoch=1), 1)
    parts = served(numbered, plain(global_batch_size=12, accumulation_steps=3, max_epoch=1), 2)
    merged = [np.sort(np.concatenate(parts[i : i + 3])) for i in range(0, len(parts), 3)]
    assert all(np.array_equal(a, b) for a, b in zip(whole, merged))


def test_an_epoch_serves_no_image_twice_and_epochs_differ(numbered):
    batches = served(numbered, plain(per_batch_size=10, max_epoch=2), 1)
    first, second = np.concatenate(batches[:7]), np.concatenate(batches[7:])
    assert sorted(first) == sorted(second) == list(range(70))
    assert not np.array_equal(epoch_order(1, 0, 70), epoch_order(1, 1, 70))
    assert not np.array_equal(epoch_order(1, 0, 70), epoch_order(2, 0, 70))


def test_batches_can_start_anywhere(numbered):
    config = plain(per_batch_size=10, max_epoch=2)
    assert np.array_equal(served(numbered, config, 1)[9], served(numbered, config, 1, first=9)[0])


def test_augmented_pixels_do_not_depend_on_ranks_or_threads():
    images = open_images("digits", "train")

    def pixels(ranks, threads):
        config = make_config(
            config_path="digits", global_batch_size=12, max_epoch=1, num_parallel_workers=threads
        )
        sources = [TrainBatches(images, config, rank, ranks) for rank in range(ranks)]
        return np.stack([sources[i % ranks][0].images[i // ranks] for i in range(12)])

    assert np.array_equal(pixels(1, 1), pixels(3, 2))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_serves_each_image_exactly_once(numbered, ranks):
    labels = []
    for rank in range(ranks):
        source = EvalBatches(numbered, plain(), rank, ranks, batch=9)
        for batch in prefetch(source):
            assert batch.labels.shape == (9,)
            labels += [label for label in batch.labels if label != PADDING_LABEL]
    assert sorted(labels) == list(range(70))


def test_more_ranks_than_images(numbered):
    few = ImageSet({"a": 0}, numbered.labels[:1] * 0, pixels=numbered.pixels[:1])
    assert [
        len(list(prefetch(EvalBatches(few, plain(), rank, 3, batch=4)))) for rank in range(3)
    ] == [1, 0, 0]


def test_fewer_images_than_a_global_batch_is_refused(numbered):
    with pytest.raises(UserError, match="--per_batch_size=8 or less"):
        TrainBatches(numbered, plain(per_batch_size=32), 0, 8)


def test_undecodable_image_stops_the_iteration_with_its_name(broken_copy):
    (broken_copy / "train" / "bee" / "003.jpg").write_text("text")
    images = open_images(str(broken_copy / "train"), "train")
    config = make_config(image_size=32, per_batch_size=16, max_epoch=1)
    with pytest.raises(UserError, match="bee/003.jpg"):
        list(prefetch(TrainBatches(images, config, 0, 1)))


def test_global_batch_must_divide():
    config = make_config(global_batch_size=10)
    assert micro_batch_size(config, 5) == 2 and global_batch_size(config, 5) == 10
    with pytest.raises(UserError, match="does not divide by 3 ranks"):
        micro_batch_size(config, 3)


def test_batches_are_made_ahead_and_errors_arrive_as_they_are():
    class Source:
        reads_ahead, made = False, []

        def __len__(self):
            return 6

        def __getitem__(self, number):
            if number == 5:
                raise UserError("the sixth")
            self.made.append(number)
            return number

    source = Source()
    batches = prefetch(source, first=1)
    assert next(batches) == 1
    # Two more are being made while the first is in use.
    deadline = time.monotonic() + 10
    while source.made != [1, 2, 3] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.made == [1, 2, 3]
    with pytest.raises(UserError, match="the sixth"):
        list(batches)


def test_balanced_epochs_of_repeated_images_are_balanced_too():
    """With --aug_repeats=10, 900, 90 and 10 images were drawn 410, 290 and 300 times."""
    labels = np.repeat(np.arange(3, dtype=np.int32), [900, 90, 10])
    pixels = np.zeros((1000, 1, 1, 3), np.uint8)
    images = ImageSet({"a": 0, "b": 1, "c": 2}, labels, pixels=pixels)
    for repeats in (1, 3, 10):
        config = make_config(
            sampling="balanced", aug_repeats=repeats, per_batch_size=1000, image_size=8
        )
        drawn, repeated = TrainBatches(images, config, 0, 1).samples(0)
        counts = np.bincount(labels[drawn])
        assert len(drawn) == 1000 and counts.max() - counts.min() < 2 * repeats, counts
        pairs = np.stack([drawn, repeated])
        assert len(np.unique(pairs, axis=1).T) == 1000
