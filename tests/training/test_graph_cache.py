"""A compiled graph of an earlier run is used only if it is the same and complete.

Its results are bit-identical.
"""

import json

import numpy as np
import pytest
from conftest import ROOT, TINY, execute, make_config, only_run
from mindspore import Tensor, nn

from src.training.graph_cache import GraphCache


@pytest.fixture
def train(image_root, tmp_path):
    """train(name, *flags) -> (losses, bytes of the last checkpoint's weights) of three steps.

    Graphs are kept under tmp_path/cache.
    """

    def run(name, *flags):
        output = tmp_path / name
        finished = execute(
            [
                "python3",
                "train.py",
                f"--data_path={image_root}/train",
                f"--output_path={output}",
                *TINY,
                "--max_steps=3",
                *flags,
            ],
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
        assert finished.status == 0, finished
        return outcome(output)

    return run


def outcome(output):
    from src.models.weight_files import read_weights

    arrays, _ = read_weights(only_run(output) / "latest.ckpt")
    lines = (only_run(output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], {
        name: array.tobytes() for name, array in arrays.items()
    }


def graphs(tmp_path):
    return sorted((tmp_path / "cache" / "acnet-mindspore" / "graphs").iterdir())


@pytest.mark.slow
def test_same_bits_with_a_kept_graph_a_damaged_one_and_none(train, tmp_path):
    fresh = train("fresh", "--compile_cache=0")
    assert not (tmp_path / "cache" / "acnet-mindspore").exists()
    assert train("first") == fresh
    (kept,) = graphs(tmp_path)
    # Another learning rate is no other graph.
    assert (
        train("second") == fresh
        and train("other_lr", "--lr=0.02")[1] != fresh[1]
        and graphs(tmp_path) == [kept]
    )
    (mindir,) = kept.rglob("*.mindir")
    whole = mindir.read_bytes()
    mindir.chmod(0o600)
    mindir.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert train("damaged") == fresh
    assert graphs(tmp_path) == [kept] and mindir.read_bytes()[100] == whole[100]


@pytest.mark.slow
def test_the_kept_graph_is_what_runs(train, tmp_path):
    smoothed, (of_smoothed,) = train("smoothed"), graphs(tmp_path)
    of_smoothed.rename(tmp_path / "aside")
    plain, (of_plain,) = train("plain", "--label_smooth=0"), graphs(tmp_path)
    assert of_plain.name != of_smoothed.name and plain[0] != smoothed[0]
    # In the other's place the graph with smoothing computes the loss with smoothing.
    of_plain.rename(tmp_path / "of_plain")
    (tmp_path / "aside").rename(of_plain)
    assert train("exchanged", "--label_smooth=0") == smoothed


@pytest.mark.slow
def test_killed_while_it_compiles(image_root, tmp_path, start, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["python3", "train.py", f"--data_path={image_root}/train", *TINY, "--max_steps=1"]
    begun = start([*words, f"--output_path={tmp_path}/killed"])
    begun.wait_for(lambda: list(tmp_path.glob("cache/acnet-mindspore/graphs/*.partial.*")))
    begun.kill()
    run = execute([*words, f"--output_path={tmp_path}/after"])
    assert run.status == 0 and [
        graph for graph in graphs(tmp_path) if ".partial." not in graph.name
    ], run


def test_a_folder_that_cannot_be_made_costs_nothing_but_the_compiling(tmp_path):
    (tmp_path / "file").write_text("")
    cell, inputs = nn.ReLU(), (Tensor(np.array([-1, 2], np.float32)),)
    assert not GraphCache(tmp_path / "file" / "graphs").compile(cell, inputs, make_config())
    assert cell(*inputs).asnumpy().tolist() == [0, 2]


FILLED = """
import os, sys; sys.path.insert(0, {root!r})
from pathlib import Path
from conftest import make_config
from src.training.graph_cache import GraphCache

class Cell:
    "Writes and reads as MindSpore does, which takes one folder a process and so one round."
    def get_parameters(self):
        return []
    def cells_and_names(self):
        return []
    def __repr__(self):
        return "cell"
    def compile(self):
        file = Path(os.environ["MS_COMPILER_CACHE_PATH"]) / "graph"
        if file.exists():
            assert file.read_text() == "graph" * 1000
        else:
            file.write_text("graph" * 1000)

configs = [make_config(label_smooth_factor=number / 200) for number in range(100)]
children = []
for _ in range(8):
    child = os.fork()
    if not child:
        cache, taken = GraphCache({folder!r}), 0
        for config in configs:
            taken += cache.compile(Cell(), (), config)
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
left = list(Path({folder!r}).iterdir())
# Of 100, 64 stay, give or take one a process, which wrote or removed its last while others counted.
assert 64 - 8 <= len(left) <= 64 + 8, left
assert all((folder / "checksums.json").exists() for folder in left), left
"""


@pytest.mark.slow
def test_processes_that_fill_it_at_once_leave_whole_graphs(tmp_path):
    """Each finds the others' folders come and go while it looks at them."""
    script = tmp_path / "fill.py"
    script.write_text(FILLED.format(root=str(ROOT / "tests"), folder=str(tmp_path / "graphs")))
    run = execute(["python3", script], PYTHONPATH=str(ROOT))
    assert run.status == 0, run


class Added(nn.Cell):
    """A cell whose code the digest does not cover."""

    def construct(self, x):
        return x + 1


def test_graphs_with_code_from_elsewhere_are_not_kept(tmp_path):
    """After a change in a user's own loss or network, the graph of the old code was trained."""
    inputs, cache = (Tensor(np.zeros(2, np.float32)),), GraphCache(tmp_path / "graphs")
    for _ in range(2):
        assert not cache.compile(Added(), inputs, make_config())
    assert not (tmp_path / "graphs").exists()
