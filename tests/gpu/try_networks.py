"""Train two steps and evaluate, each in this process, on the null GPU:

    NULL_GPU=FOLDER python3 tests/gpu/try_networks.py NETWORK+BLOCK:AMP_LEVEL[:KEY=VALUE]... ...

Prints a JSON line for each: what the second step and the evaluation asked of the GPU, or the error.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import null_gpu  # noqa: E402

BATCH = 4


def main(cases):
    os.environ.setdefault("GLOG_v", "4")
    null_gpu.preload()
    from src.utils.device import prepare_process

    prepare_process()
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("GPU", 0)
    for case in cases:
        try:
            report = try_network(case)
        except Exception as failure:  # MindSpore's errors are of every kind
            lines = [line for line in str(failure).splitlines() if line.strip() and line[0] != "-"]
            report = {"error": f"{type(failure).__name__}: {lines[0]}"}
        print(json.dumps({"case": case, **report}), flush=True)


def try_network(case):
    import numpy as np

    from src.cli.recipes import load_config
    from src.dataset.batches import Batch
    from src.distributed.communicator import Communicator
    from src.inference.mindspore_backend import MindSporeBackend
    from src.models.create import create_network
    from src.models.networks import NETWORKS
    from src.training.create_step import create_train_step

    names, amp_level, *keys = case.split(":")
    network, _, block = names.partition("+")
    # A batch norm needs more than a pixel; launches do not depend on the size.
    size = 32 if NETWORKS[network].image_size <= 64 else 64
    config = load_config(
        {
            "data_path": "none",
            "device_target": "GPU",
            "network": network,
            "block": block or "base",
            "amp_level": amp_level,
            "num_classes": "10",
            "image_size": str(size),
            "per_batch_size": str(BATCH),
            **dict(key.split("=", 1) for key in keys),
        }
    )
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (BATCH, size, size, 3), np.uint8)
    batch = Batch(images, np.arange(BATCH, dtype=np.int32))
    network = create_network(config)
    started = time.perf_counter()
    step = create_train_step(network, config, Communicator())
    micro_batches = [batch] * config.accumulation_steps
    first = step(micro_batches, 0.1, 0)
    first_s = time.perf_counter() - started
    before = null_gpu.counters()
    result = step(micro_batches, 0.1, 1)
    of_step = (null_gpu.counters() - before).summary()
    logits = MindSporeBackend(network, config)(images)
    return {
        **of_step,
        "first_step_s": round(first_s, 1),
        "skipped": first.skipped or result.skipped,
        "logits": str(logits.dtype),
        "parameters": sorted({str(parameter.dtype) for parameter in network.get_parameters()}),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    # MindSpore's own end would take the stand-ins down piece by piece.
    os._exit(0)
