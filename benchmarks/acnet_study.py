"""A miniature of the ACNet paper on the bundled digits.

Base against acb, several seeds, upright and rotated test images.

    python3 benchmarks/acnet_study.py [--seeds=5] [--epochs=20] [--networks=cifar_quick,resnet18]
        [--output=docs/acnet_study]

Prints a table and a machine-readable line a network; writes rotation.png (accuracy over angle) and
skeleton.png (the mean absolute weight at each kernel position, as in the paper's figure 6).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli.run import run_process  # noqa: E402
from src.utils.device import prepare_process  # noqa: E402

ANGLES = tuple(range(0, 181, 15))
BLOCKS = ("base", "acb")


def main(arguments):
    options = parse(arguments)
    prepare_process()
    from src.utils.device import select_device

    select_device("CPU", 0)
    results = {}
    for network in options.networks.split(","):
        for block in BLOCKS:
            runs = [
                study_run(network, block, seed, options.epochs)
                for seed in range(1, options.seeds + 1)
            ]
            results[network, block] = runs
            print(report(network, block, runs), flush=True)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    print(table(results))
    for network in options.networks.split(","):
        print("acnet_study " + json.dumps(summary(results, network)))
    plot_rotation(results, output / "rotation.png")
    plot_skeleton(results, output / "skeleton.png")
    print(f"figures in {output}/")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--networks", default="cifar_quick,resnet18")
    parser.add_argument("--output", default="docs/acnet_study")
    return parser.parse_args(arguments)


def study_run(network_name, block, seed, epochs):
    """Train one network by the digits recipe; {upright, by_angle, fused_upright, kernels}."""
    from src.cli.recipes import load_config
    from src.dataset.sources import open_images
    from src.dataset.splits import TrainingData
    from src.distributed.communicator import Communicator
    from src.inference.evaluation import Evaluator
    from src.inference.mindspore_backend import MindSporeBackend
    from src.kernels.library import KernelChoice
    from src.models.create import create_network
    from src.models.reparam import fuse
    from src.runs.recorder import Recorder
    from src.training.resolve import resolve_data
    from src.training.start import RandomWeights
    from src.training.trainer import Trainer

    data = TrainingData(open_images("digits", "train"), None)
    val_images = open_images("digits", "val")
    config = resolve_data(
        load_config(
            {
                "config_path": "digits",
                "network": network_name,
                "block": block,
                "seed": seed,
                "max_epoch": epochs,
                "run_eval": 0,
            }
        ),
        data,
    )
    network = create_network(config)
    trainer = Trainer(network, config, Communicator(), data, Recorder(), KernelChoice())
    RandomWeights().load_into(trainer)
    trainer.fit()
    fused = fuse(network) if block == "acb" else network
    fused_engine = MindSporeBackend(fused.set_train(False), config)
    by_angle = [
        Evaluator(rotated(val_images, config, angle), config, Communicator())(fused_engine).top1
        for angle in ANGLES
    ]
    trained = Evaluator(val_images, config, Communicator())(MindSporeBackend(network, config)).top1
    return {
        "upright": trained,
        "fused_upright": by_angle[0],
        "by_angle": by_angle,
        "kernels": kernels(fused),
    }


def rotated(images, config, angle):
    """The images at evaluation size, turned by ``angle`` degrees about their centre on black."""
    import cv2
    import numpy as np

    from src.dataset.image_set import ImageSet
    from src.dataset.transforms import eval_transform

    size = config.image_size
    turn = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, 1.0)
    pixels = np.stack(
        [
            cv2.warpAffine(
                np.ascontiguousarray(eval_transform(images.load(index), config)), turn, (size, size)
            )
            for index in range(len(images))
        ]
    )
    return ImageSet(images.class_to_index, images.labels, pixels=pixels)


def kernels(network):
    """{k: mean absolute weight (k, k)} over the k x k convolutions, for k = 3 and 5.

    Each layer is scaled to a largest weight of 1.
    """
    import numpy as np
    from mindspore import nn

    found = {}
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.Conv2d) and cell.kernel_size in ((3, 3), (5, 5)):
            magnitude = np.abs(cell.weight.asnumpy()).mean(axis=(0, 1))
            found.setdefault(cell.kernel_size[0], []).append(magnitude / magnitude.max())
    return {size: np.mean(layers, axis=0) for size, layers in found.items()}


def rotated_mean(run):
    """Mean accuracy over all angles but 0."""
    return sum(run["by_angle"][1:]) / (len(ANGLES) - 1)


def spread(values):
    """(mean, standard deviation over runs with n - 1)."""
    import statistics

    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def report(network, block, runs):
    upright, turned = (
        spread([run["upright"] for run in runs]),
        spread([rotated_mean(run) for run in runs]),
    )
    return (
        f"{network} {block}: upright {upright[0]:.2f} +- {upright[1]:.2f}, rotated {turned[0]:.2f} "
        f"+- {turned[1]:.2f}"
    )


def summary(results, network):
    row = {"network": network, "seeds": len(results[network, "base"])}
    for block in BLOCKS:
        runs = results[network, block]
        row[f"{block}_top1"], row[f"{block}_std"] = (
            round(value, 3) for value in spread([run["upright"] for run in runs])
        )
        row[f"{block}_rotated"], row[f"{block}_rotated_std"] = (
            round(value, 3) for value in spread([rotated_mean(run) for run in runs])
        )
    row["fused_top1"] = round(
        spread([run["fused_upright"] for run in results[network, "acb"]])[0], 3
    )
    return row


def table(results):
    lines = [
        "| network | block | top-1 upright | fused | top-1 rotated by 15 to 180 degrees |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (network, block), runs in results.items():
        upright, turned = (
            spread([run["upright"] for run in runs]),
            spread([rotated_mean(run) for run in runs]),
        )
        fused = f"{spread([run['fused_upright'] for run in runs])[0]:.2f}" if block == "acb" else ""
        lines.append(
            f"| {network} | {block} | {upright[0]:.2f} +- {upright[1]:.2f} | {fused} | "
            f"{turned[0]:.2f} +- {turned[1]:.2f} |"
        )
    return "\n".join(lines)


def new_figure(columns, width, height):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_rotation(results, path):
    import numpy as np

    networks = list(dict.fromkeys(network for network, _ in results))
    figure = new_figure(len(networks), 5, 3.6)
    for axes, network in zip(np.atleast_1d(figure.subplots(1, len(networks))), networks):
        for block, colour in zip(BLOCKS, ("tab:gray", "tab:red")):
            values = np.array([run["by_angle"] for run in results[network, block]])
            mean, deviation = (
                values.mean(axis=0),
                values.std(axis=0, ddof=1) if len(values) > 1 else 0,
            )
            axes.plot(ANGLES, mean, color=colour, marker=".", label=block)
            axes.fill_between(ANGLES, mean - deviation, mean + deviation, color=colour, alpha=0.2)
        axes.set(title=network, xlabel="rotation (degrees)", ylabel="top-1 (%)", xticks=ANGLES[::2])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)


def plot_skeleton(results, path):
    import numpy as np

    figure = new_figure(len(results), 2.9, 3.0)
    for axes, ((network, block), runs) in zip(
        np.atleast_1d(figure.subplots(1, len(results))), results.items()
    ):
        size = max(runs[0]["kernels"])
        mean = np.mean([run["kernels"][size] for run in runs], axis=0)
        axes.imshow(mean, cmap="viridis", vmin=0.3, vmax=1)
        for (row, column), value in np.ndenumerate(mean):
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < 0.8 else "black",
            )
        axes.set(
            title=f"{network}\n{'fused acb' if block == 'acb' else 'base'}, {size}x{size}",
            xticks=[],
            yticks=[],
        )
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_process(lambda signals: main(sys.argv[1:]))
