"""Loads weights into a network: every name and shape must match, in any known naming scheme."""

from collections.abc import Mapping
from enum import Enum

import numpy as np
from mindspore import Parameter, Tensor, nn

from src.models.networks import namings
from src.models.weight_files import read_weights, weights_in_use
from src.utils.errors import UserError

_MISMATCHES_SHOWN = 3
# PyTorch's count of training batches, on which nothing here depends.
_WITHOUT_MEANING = ("num_batches_tracked",)


class Head(Enum):
    """What to do with the classifier of a file of weights."""

    LOAD = "load it; another shape is an error"
    LOAD_IF_IT_FITS = "leave it out if its shape differs"
    LEAVE_OUT = "leave it out"


def load_weights(network: nn.Cell, path: str, head: Head = Head.LOAD) -> list[str]:
    """Load a file of weights into a network of ``create_model``; see ``assign_weights``."""
    arrays, _ = read_weights(path)
    return assign_weights(network, arrays, path, head)


def assign_weights(
    network: nn.Cell, arrays: Mapping[str, np.ndarray], path: object, head: Head = Head.LOAD
) -> list[str]:
    """Copy {name: array} into ``network``: every name and shape must match.

    Names may be this project's, torchvision's and timm's, or the ACNet repository's: the naming
    that fits best is taken. Optimizer state and PyTorch's batch counts are ignored.

    Args:
        path: what to call the file in messages.
        head: what to do with the classifier.

    Returns:
        Names of the parameters that were left out.

    Raises:
        UserError: counts the mismatches and names the first, in the file's names; or names weights
            that are not finite or of an integer type, or variances below zero.
    """
    weights = {
        name: array
        for name, array in weights_in_use(arrays).items()
        if not name.endswith(_WITHOUT_MEANING)
    }
    parameters = {p.name: p for p in network.get_parameters()}
    names = _best_names(parameters, weights, network.network_name)
    mismatches, heads = _compare(parameters, weights, names)
    if mismatches or (heads and head is Head.LOAD):
        found = mismatches + heads
        hint = (
            "; train.py --allow_head_mismatch=1 starts from all but the classifier"
            if not mismatches
            else f"; it may belong to another network, block or image_size (here: "
            f"{network.network_name}); pass --network=NAME or --image_size=PIXELS"
        )
        more = (
            f" and {len(found) - _MISMATCHES_SHOWN} more" if len(found) > _MISMATCHES_SHOWN else ""
        )
        raise UserError(
            f"checkpoint '{path}' does not fit: {', '.join(found[:_MISMATCHES_SHOWN])}{more}{hint}"
        )
    _check_values(weights, path)
    leaves_out = heads or head is Head.LEAVE_OUT
    skipped = {name for name in parameters if leaves_out and is_classifier(name)}
    for name, parameter in parameters.items():
        if name not in skipped:
            parameter.set_data(
                Tensor(np.ascontiguousarray(weights[names[name] or name], np.float32))
            )
    return sorted(skipped)


def copy_weights(source: nn.Cell, target: nn.Cell) -> None:
    """Give ``target`` the values of the parameters of the same names in ``source``."""
    values = {p.name: p.asnumpy() for p in source.get_parameters()}
    for parameter in target.get_parameters():
        parameter.set_data(Tensor(values[parameter.name].copy()))


def _check_values(weights: Mapping[str, np.ndarray], path: object) -> None:
    """Raise UserError for weights that no network can compute with; names the first."""
    for name, array in weights.items():
        problem = None
        if not np.issubdtype(array.dtype, np.floating):
            problem = f"is of type {array.dtype}, not floating point"
        elif not np.isfinite(array).all():
            problem = f"has {np.count_nonzero(~np.isfinite(array))} values that are not finite"
        elif name.endswith(("moving_variance", "running_var")) and (array < 0).any():
            problem = "has negative variances"
        if problem:
            raise UserError(f"checkpoint '{path}' is unusable: {name} {problem}")


def is_classifier(name: str) -> bool:
    """True for the parameters of the last dense layer."""
    return name.startswith("classifier.")


def _best_names(
    parameters: Mapping[str, Parameter], weights: Mapping[str, np.ndarray], network: str
) -> dict[str, str | None]:
    """{our name: name in the file}, in the naming scheme that matches the most names."""
    candidates = [{name: naming(name) for name in parameters} for naming in namings(network)]
    return max(candidates, key=lambda names: sum(foreign in weights for foreign in names.values()))


def _compare(
    parameters: Mapping[str, Parameter],
    weights: Mapping[str, np.ndarray],
    names: Mapping[str, str | None],
) -> tuple[list[str], list[str]]:
    """Messages on what does not match outside the classifier, and within it."""
    mismatches: list[str] = []
    heads: list[str] = []
    for name, parameter in parameters.items():
        foreign = names[name] or name
        if foreign not in weights:
            (heads if is_classifier(name) else mismatches).append(f"{foreign} is missing")
        elif tuple(weights[foreign].shape) != tuple(parameter.shape):
            what = (
                f"{foreign} is {tuple(weights[foreign].shape)} instead of {tuple(parameter.shape)}"
            )
            (heads if is_classifier(name) else mismatches).append(what)
    known = set(names.values())
    mismatches += [f"{name} is not in the network" for name in weights if name not in known]
    return mismatches, heads
