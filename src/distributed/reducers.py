"""The table of reducers: how gradients and running statistics are averaged over ranks.

Imports nothing of MindSpore, so that a wrong name is reported at once.
"""

import pkgutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from src.cli.config import Config
from src.distributed.communicator import Communicator
from src.distributed.overlap import ReducedGradients
from src.kernels.library import ReadyGradients
from src.utils.errors import UserError, suggestion

# {name: "MODULE:CLASS"} for GPU and Ascend, called as (config, communicator). On CPU gradients are
# averaged in their own memory (host_reducer.py), whatever the key ``reducer`` says.
REDUCERS = {
    "mpi": "src.distributed.device_reducers:HostStagedReducer",
    "device": "src.distributed.device_reducers:DeviceReducer",
}
_AUTO = "device"
_CPU_REDUCER = "src.distributed.host_reducer:HostReducer"


class Reducer(Protocol):
    """Reduces the gradients of the backward pass to what the optimizer takes."""

    def backward(self) -> AbstractContextManager[None]:
        """A context for the last forward and backward pass before ``reduce``."""

    def add(self, total: Any, gradients: Sequence[Any]) -> Any:
        """The sum of ``total``, an earlier result or None, and ``gradients``."""

    def reduce(
        self, total: Any, micro_steps: int, statistics: Sequence[Any]
    ) -> tuple[Any, ReducedGradients | None]:
        """Means over ranks and over the ``micro_steps`` gradients that were added.

        The parameters ``statistics`` are replaced by their means over ranks. If ReducedGradients is
        returned, gradient i may be read only after it has yielded i.
        """

    def broadcast(self, parameters: Sequence[Any]) -> None:
        """Replace each parameter by rank 0's."""


def check_reducer(config: Config) -> None:
    """Raise UserError for an unknown reducer."""
    known = ("auto", *REDUCERS)
    if config.reducer not in known:
        near = suggestion(config.reducer, known)
        raise UserError(f"unknown reducer={config.reducer}{near}; available: {', '.join(known)}")


def create_reducer(
    config: Config, communicator: Communicator, ready_gradients: ReadyGradients | None = None
) -> Reducer:
    """The reducer for the device of ``config``.

    Args:
        ready_gradients: notifications from the kernels that compute the gradients, if any.
    """
    if config.device_target == "CPU":
        return pkgutil.resolve_name(_CPU_REDUCER).of(config, communicator, ready_gradients)
    name = _AUTO if config.reducer == "auto" else config.reducer
    return pkgutil.resolve_name(REDUCERS[name])(config, communicator)
