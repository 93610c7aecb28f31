"""What a network says of each image of a set."""

import numpy as np
import pytest
from conftest import make_config

from src.dataset.image_set import ImageSet, class_names
from src.inference.report import augmented_samples, most_confused, predict_set
from src.utils.errors import UserError


def test_judgement_by_hand(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(40)]
    random = np.random.default_rng(0)
    import cv2

    for number, path in enumerate(paths):
        cv2.imwrite(path, random.integers(0, 255, (32, 32, 3), np.uint8))
    (tmp_path / "7.png").write_text("text")
    labels = np.arange(40, dtype=np.int32) % 3
    seen = []

    def engine(images):
        # The n-th image is taken for class 0, but for image 4 for class 2, the surer the later.
        logits = np.zeros((len(images), 3), np.float32)
        for row in range(len(images)):
            number = len(seen)
            seen.append(number)
            logits[row, 2 if number == 4 else 0] = 1 + number / 10
        return logits

    judged = predict_set(
        ImageSet({"a": 0, "b": 1, "c": 2}, labels, paths), engine, make_config(image_size=32)
    )
    assert judged.indices.tolist() == [index for index in range(40) if index != 7]
    assert judged.labels.tolist() == labels[judged.indices].tolist()
    confusion = judged.confusion(3)
    # 14 of class 0; 13 of class 1 without image 7 and with image 4 elsewhere; 13 of class 2.
    assert confusion.tolist() == [[14, 0, 0], [11, 0, 1], [13, 0, 0]]
    assert most_confused(confusion, 2) == [(2, 0, 13), (1, 0, 11)]
    assert judged.indices[judged.worst(3)].tolist() == [38, 37, 35]
    p = np.exp(1 + 38 / 10) / (np.exp(1 + 38 / 10) + 2)
    assert np.isclose(judged.probability[judged.worst(1)][0], p)
    assert np.isclose(judged.probability_of_label[judged.worst(1)][0], (1 - p) / 2)


def test_outputs_that_are_not_finite_are_no_judgement():
    images = ImageSet({"a": 0}, np.zeros(2, np.int32), pixels=np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="2 of 2"):
        predict_set(
            images, lambda batch: np.full((len(batch), 1), np.nan), make_config(image_size=32)
        )


def test_augmented_images_are_those_of_the_first_epoch():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), np.uint8)
    images = ImageSet({"a": 0, "b": 1}, np.array([0, 1] * 4 + [0], np.int32), pixels=pixels)
    config = make_config(image_size=16, seed=5)
    found = augmented_samples(images, config, 3)
    assert [label for _, label in found] == [0, 0, 0] and all(
        image.shape == (16, 16, 3) for image, _ in found
    )
    from src.dataset.batches import TrainBatches

    batches = TrainBatches(images, config.model_copy(update={"per_batch_size": 9}), 0, 1)
    assert any(np.array_equal(found[1][0], image) for image in batches[0].images)


def test_classes_without_a_name_have_their_number():
    assert class_names({"ant": 1}, 3) == ["0", "ant", "2"]
