"""Train and use image classifiers from Python, as the commands do:

    from acnet_mindspore import fit, load

    classifier = fit("my_photos", config_path="finetune", pretrained="resnet18")
    print(classifier.predict("photo.jpg").classes[0])
    classifier = load("outputs/2026-01-31_time_12_00_00/best.ckpt")

Keywords are the commands' flags: ``python3 train.py --help`` describes them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acnet_mindspore.api import BLOCKS, NETWORKS, UserError, create_network, fit, load

__all__ = ["BLOCKS", "NETWORKS", "UserError", "create_network", "fit", "load"]


def __getattr__(name: str) -> Any:
    # The commands import this package too, and must not have threads yet (src/cli/run.py).
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from acnet_mindspore import api

    return getattr(api, name)
