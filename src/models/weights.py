"""Weights into a network: strict by name and shape, from any of the known names."""

import numpy as np
from mindspore import Tensor

from src.models.formats import MOMENTUM_PREFIX, read_weights
from src.models.name_maps import acnet_name, torch_name
from src.utils.errors import UserError

_MISMATCHES_SHOWN = 3
# PyTorch's count of training batches, which no inference or training here depends on.
_WITHOUT_MEANING = ("num_batches_tracked",)


def load_weights(network, path, allow_head_mismatch=False):
    """Load a file of weights into ``network``, a result of ``build_model``; see ``assign_weights``."""
    arrays, _ = read_weights(path)
    return assign_weights(network, arrays, path, allow_head_mismatch)


def assign_weights(network, arrays, path, allow_head_mismatch=False):
    """Copy {name: array} into ``network``: every name and shape must match.

    Names are this project's, torchvision's and timm's, or the ACNet repository's, whichever fits best. Optimizer state
    and PyTorch's batch counts are passed over.

    Args:
        path: what to call the file in messages.
        allow_head_mismatch: leave out the classifier where its shape differs.

    Returns:
        Names of the parameters that were left out.

    Raises:
        UserError: that counts the mismatches and names the first, in the file's names.
    """
    weights = {name: array for name, array in arrays.items()
               if not name.startswith(MOMENTUM_PREFIX) and not name.endswith(_WITHOUT_MEANING)}
    parameters = {p.name: p for p in network.get_parameters()}
    names = _best_names(parameters, weights, network.network_name)
    mismatches, heads = _compare(parameters, weights, names)
    if mismatches or (heads and not allow_head_mismatch):
        found = mismatches + heads
        hint = ("; --allow_head_mismatch=1 starts from all but the classifier" if not mismatches
                else "; is it of another network or block?")
        more = f" and {len(found) - _MISMATCHES_SHOWN} more" if len(found) > _MISMATCHES_SHOWN else ""
        raise UserError(f"checkpoint '{path}' does not fit: {', '.join(found[:_MISMATCHES_SHOWN])}{more}{hint}")
    skipped = {name for name in parameters if heads and is_classifier(name)}
    for name, parameter in parameters.items():
        if name not in skipped:
            parameter.set_data(Tensor(np.ascontiguousarray(weights[names[name]], np.float32)))
    return sorted(skipped)


def classes_in(arrays, network):
    """Number of classes of the weights {name: array} of the network named so, or None where its classifier is not found."""
    for naming in _namings(network):
        bias = arrays.get(naming("classifier.bias"))
        if bias is not None:
            return len(bias)
    return None


def is_classifier(name):
    """True for the parameters of the last dense layer."""
    return name.startswith("classifier.")


def _namings(network):
    return (lambda name: name, lambda name: torch_name(name, network), lambda name: acnet_name(name, network),
            lambda name: acnet_name(name, network, fused=True))


def _best_names(parameters, weights, network):
    """{our name: name in the file} by the naming that finds the most."""
    candidates = [{name: naming(name) for name in parameters} for naming in _namings(network)]
    return max(candidates, key=lambda names: sum(foreign in weights for foreign in names.values()))


def _compare(parameters, weights, names):
    mismatches, heads = [], []
    for name, parameter in parameters.items():
        foreign = names[name] or name
        if foreign not in weights:
            mismatches.append(f"{foreign} is missing")
        elif tuple(weights[foreign].shape) != tuple(parameter.shape):
            what = f"{foreign} is {tuple(weights[foreign].shape)} instead of {tuple(parameter.shape)}"
            (heads if is_classifier(name) else mismatches).append(what)
    known = set(names.values())
    mismatches += [f"{name} is not in the network" for name in weights if name not in known]
    return mismatches, heads
