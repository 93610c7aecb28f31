"""Weights as the scripts of the trade save them, drawn at random: the same network, or refused."""

import argparse

import numpy as np
from mindspore import Tensor

from src.models.weights import load_weights
from src.utils.errors import UserError

_PREFIXES = ("", "module.", "model.", "_orig_mod.", "_orig_mod.module.", "model._orig_mod.")


def draw_weight_file(random, state, folder):
    """Save the arrays of ``state`` in one of many ways.

    Returns the file, its torch.dtype, and whether a weight is missing, too much, of another shape
    or an integer in it.
    """
    import torch
    from safetensors.torch import save_file

    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    prefix, dtype = str(random.choice(_PREFIXES)), types[random.integers(len(types))]
    weights = {f"{prefix}{name}": torch.tensor(array).to(dtype) for name, array in state.items()}
    victim, change = random.choice(list(weights)), random.integers(9)
    if change == 0:
        del weights[victim]
    elif change == 1:
        weights[victim] = weights[victim].reshape(-1)[:-1].clone()
    elif change == 2:
        weights[victim] = weights[victim].to(torch.int8)
    elif change == 3:
        weights[f"{prefix}unknown.weight"] = torch.ones(2)
    if random.random() < 0.5:
        weights |= {
            name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
            for name in weights
            if name.endswith("running_mean")
        }
    names = list(weights)
    random.shuffle(names)
    weights = {name: weights[name] for name in names}
    if random.random() < 0.3:
        file = folder / "weights.safetensors"
        save_file(weights, file)
    else:
        file, wrappers = folder / "weights.pth", _wrappers(weights)
        wrapped = wrappers[random.integers(len(wrappers))]
        torch.save(wrapped, file, _use_new_zipfile_serialization=bool(random.random() < 0.8))
    return file, dtype, change < 4


def check_weight_file(file, dtype, changed, network, target):
    """Whether ``target`` gets the weights of ``network``; AssertionError if it gets others.

    Half precision comes back rounded; what is missing, odd or too much is named.
    """
    import torch

    for parameter in target.get_parameters():
        parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
    try:
        load_weights(target, str(file))
    except UserError as refusal:
        assert changed and "Traceback" not in str(refusal), refusal
        return False
    assert not changed
    for theirs, ours in zip(network.get_parameters(), target.get_parameters(), strict=True):
        expected = torch.tensor(theirs.asnumpy()).to(dtype).float().numpy()
        assert np.array_equal(expected, ours.asnumpy()), ours.name
    return True


def _wrappers(weights):
    import torch

    return (
        weights,
        {"state_dict": weights, "epoch": 3, "arch": "resnet18"},
        {"model": weights, "optimizer": {"state": {}, "param_groups": []}},
        {"model": weights, "args": argparse.Namespace(lr=0.1), "best": 76.1},
        {"model_state_dict": weights, "loss": torch.tensor(0.5)},
        {"state_dict": {}, "state_dict_ema": weights},
        {"epoch": 1, "pytorch-lightning_version": "2.6", "state_dict": weights},
    )
