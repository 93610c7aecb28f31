"""Moving averages of weights: their formula, and what evaluation and resumed runs make of them."""

import json

import numpy as np
import pytest
from conftest import TINY, execute, make_config, only_run
from mindspore import Parameter, Tensor, nn

from src.models.weight_files import read_weights, weights_in_use
from src.training.resolve import check_training_keys
from src.training.weight_average import WeightAverage
from src.utils.errors import UserError


def one_weight(value):
    cell = nn.Cell()
    cell.weight = Parameter(Tensor(np.full(3, value, np.float32)), name="weight")
    return cell


def test_follows_its_formula():
    """By hand: decays 2/11, 3/12, 4/13, ... until 0.9 is reached at update 81."""
    network = one_weight(1.0)
    average = WeightAverage(network, 0.9)
    average.start()
    expected = 1.0
    for update in range(1, 101):
        network.weight.asnumpy()[...] = update
        average.update(update)
        decay = 0.9 if update >= 81 else (1 + update) / (10 + update)
        expected = decay * expected + (1 - decay) * update
    assert average.parameters[0].asnumpy() == pytest.approx(expected, rel=1e-5)
    # An average over some ten updates lies ten updates behind.
    assert 89 < expected < 93


def test_the_network_has_the_averages_only_within_the_context():
    network = one_weight(1.0)
    average = WeightAverage(network, 0.9)
    network.weight.asnumpy()[...] = 12
    average.update(1)
    with average.in_network():
        assert network.weight.asnumpy() == pytest.approx(1 + 9 / 11 * 11)
    assert network.weight.asnumpy() == pytest.approx(12)
    average.move_to_network()
    assert network.weight.asnumpy() == pytest.approx(10)


def test_evaluation_uses_the_averages_of_a_checkpoint():
    arrays = {name: np.full(1, n) for n, name in enumerate(("w", "optimizer.m.w", "ema.w"))}
    assert {name: array[0] for name, array in weights_in_use(arrays).items()} == {"w": 2}
    assert weights_in_use({"w": arrays["w"], "optimizer.m.w": arrays["w"]}) == {"w": arrays["w"]}


def test_another_device_is_refused():
    with pytest.raises(UserError, match="ema_decay=0.9 needs device_target=CPU"):
        check_training_keys(make_config(ema_decay=0.9, device_target="GPU"))


@pytest.mark.slow
def test_what_is_logged_is_what_the_checkpoint_gives_and_resumes_to_the_same_bits(
    image_root, tmp_path
):
    flags = [*TINY, f"--data_path={image_root}/train", "--ema_decay=0.9", "--clip_norm=1"]
    flags += ["--run_eval=1", "--lr=0.05", "--deploy=1", "--block=acb", "--ckpt_interval=1"]
    flags += ["--class_weights=1,2,1", "--layer_decay=0.8", "--aug_repeats=2"]
    outcomes = []
    for name, stops in (("whole", []), ("parts", [2])):
        for last in (*stops, 4):
            resume = ["--resume=auto"] if stops and last == 4 else []
            run = execute(
                ["python3", "train.py", *flags, f"--max_epoch={last}", "--T_max=4", *resume]
                + [f"--output_path={tmp_path}/{name}"]
            )
            assert run.status == 0, run
        folder = only_run(tmp_path / name)
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        outcomes.append((read_weights(folder / "latest.ckpt")[0], metrics[-1]["top1"]))
    (whole, top1), (parts, _) = outcomes
    assert any(name.startswith("ema.") for name in whole) and whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert not np.array_equal(whole["ema.classifier.weight"], whole["classifier.weight"])
    evaluated = execute(
        ["python3", "eval.py", f"--data_path={image_root}/val", f"--result_path={tmp_path}/r.json"]
        + [f"--checkpoint_file_path={only_run(tmp_path / 'whole')}/latest.ckpt"]
    )
    assert evaluated.status == 0, evaluated
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert result["top1"] == pytest.approx(top1, abs=1e-3)
