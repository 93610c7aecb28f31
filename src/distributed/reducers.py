"""The table of reducers: how gradients are averaged over ranks.

Imports nothing of MindSpore, so that a wrong name is reported at once.
"""

import pkgutil
from typing import TYPE_CHECKING

from src.cli.config import Config
from src.distributed.communicator import Communicator
from src.utils.errors import UserError, suggestion

if TYPE_CHECKING:
    from src.distributed.device_reducers import DeviceReducer

# {name: "MODULE:CLASS"} of ``DeviceReducer``s for GPU and Ascend, called as (config, communicator).
# On CPU gradients are averaged in their own memory (host_reducer.py), whatever the key says.
REDUCERS = {
    "mpi": "src.distributed.device_reducers:HostStagedReducer",
    "device": "src.distributed.device_reducers:CollectiveReducer",
}
_AUTO = "device"


def check_reducer(config: Config) -> None:
    """Raise UserError for an unknown reducer."""
    known = ("auto", *REDUCERS)
    if config.reducer not in known:
        near = suggestion(config.reducer, known)
        raise UserError(f"unknown reducer={config.reducer}{near}; available: {', '.join(known)}")


def create_device_reducer(config: Config, communicator: Communicator) -> "DeviceReducer":
    """The reducer that the key ``reducer`` names, for GPU and Ascend."""
    name = _AUTO if config.reducer == "auto" else config.reducer
    return pkgutil.resolve_name(REDUCERS[name])(config, communicator)
