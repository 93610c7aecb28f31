"""Ranks on several hosts, each with its own name, address, /dev/shm and ssh server.

The lines of docs/distributed.md, word for
word but for the names."""

import json
import os
import re
import shlex
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, Started, execute, only_run
from hosts.rig import Rig, missing

from src.models.weight_files import read_weights

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    with Rig(tmp_path_factory.mktemp("rig"), 3) as rig:
        yield rig


def shown(beginning):
    """The line of docs/distributed.md that begins so."""
    (line,) = re.findall(
        rf"(?m)^    ({re.escape(beginning)}.*)$", (ROOT / "docs" / "distributed.md").read_text()
    )
    return line


def run_on_h1(rig, words):
    return execute(rig.on("h1", *map(str, words), cwd=ROOT), **rig.environment)


def placed(run):
    """{host: number of ranks} as the first line says."""
    return {
        host: int(count) for host, count in re.findall(r"(h\d): (\d+)", run.out.splitlines()[0])
    }


def typed(line, image_root, output, **names):
    for there, here in {"/path/to/imagenet": image_root, "SHARED_FOLDER": output, **names}.items():
        line = line.replace(there, str(here))
    return [*shlex.split(line), *TINY, "--max_steps=3", "--lr=0.01"]


def test_readmes_host_line_uses_every_host(rig, image_root, tmp_path):
    line = shown("mpirun -n 16 --host node1:8,node2:8")
    words = typed(line, image_root, tmp_path, **{"-n 16": "-n 4", "node1:8,node2:8": "h1:1,h2:3"})
    run = run_on_h1(rig, [*words, "--threads=1"])
    assert run.status == 0 and placed(run) == {"h1": 1, "h2": 3}, run


def test_readmes_hostfile_line(rig, image_root, tmp_path):
    (tmp_path / "hosts").write_text("h1 slots=1\nh2 slots=1\nh3 slots=1\n")
    words = typed(
        shown("mpirun -n 16 --hostfile"),
        image_root,
        tmp_path / "out",
        **{"-n 16": "-n 3", "hosts.txt": tmp_path / "hosts"},
    )
    run = run_on_h1(rig, words)
    assert run.status == 0 and placed(run) == {"h1": 1, "h2": 1, "h3": 1}, run


def test_readmes_launcher_line_divides_each_hosts_cores(rig, image_root, tmp_path):
    words = typed(
        shown("python3 scripts/launch.py --hosts="),
        image_root,
        tmp_path,
        **{"node1:8,node2:8": "h1:2,h2:2"},
    )
    run = run_on_h1(rig, words)
    assert run.status == 0 and "h1: 2, h2: 2" in run.out, run
    _, metadata = read_weights(only_run(tmp_path) / "latest.ckpt")
    assert metadata["world_size"] == 4 and len(set(metadata["threads"])) == 1


def test_more_ranks_than_slots_are_shared_out(rig, image_root, tmp_path):
    words = typed(
        shown("mpirun -n 16 --host node1:8,node2:8"),
        image_root,
        tmp_path,
        **{"-n 16": "-n 4", "node1:8,node2:8": "h1:1,h2:1"},
    )
    run = run_on_h1(rig, words)
    assert run.status == 0 and placed(run) == {"h1": 2, "h2": 2}, run


@pytest.mark.parametrize("frozen", [False, True])
def test_two_hosts_compute_the_bits_of_one(rig, image_root, trained_run, tmp_path, frozen):
    """The same seed, data, number of ranks and threads of each; also after frozen epochs."""
    start = [f"--pretrained={trained_run}/best.ckpt", "--freeze_epochs=1"] if frozen else []
    weights = []
    for name, hosts in (
        ("one", ["-n", "2", "--host", "h1:2"]),
        ("two", ["-n", "2", "--host", "h1:1,h2:1"]),
    ):
        run = run_on_h1(
            rig,
            [
                "mpirun",
                *hosts,
                "-x",
                "PATH",
                "python3",
                "train.py",
                "--run_distribute=1",
                "--threads=1",
                *TINY,
                f"--data_path={image_root}/train",
                f"--output_path={tmp_path}/{name}",
                "--max_epoch=2",
                "--lr=0.02",
                *start,
            ],
        )
        assert run.status == 0, run
        weights.append(read_weights(only_run(tmp_path / name) / "latest.ckpt")[0])
    arrays = {name for name in weights[0] if name not in ("metadata", "checksum")}
    assert len(arrays) > 20
    for name in arrays:
        assert np.array_equal(weights[0][name], weights[1][name]), name


def one_line(run, *words):
    assert run.status == 2 and len(run.error_lines) == 1 and "Traceback" not in run.err, run
    for word in words:
        assert word in run.error_lines[0], run


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_ranks_with_other_numbers_of_cores_are_refused_by_host(rig, image_root, tmp_path):
    words = typed(
        shown("mpirun -n 16 --host node1:8,node2:8"),
        image_root,
        tmp_path,
        **{"-n 16": "-n 3", "node1:8,node2:8": "h1:1,h2:2"},
    )
    one_line(
        run_on_h1(rig, words),
        "cores of each rank=",
        "rank 0 (h1)",
        "ranks 1, 2 (h2)",
        "--threads=1",
    )


@pytest.fixture
def hidden(rig):
    """A function (host, folder): that host sees an empty folder there until the test ends."""
    covered = []

    def hide(host, folder):
        execute(rig.on(host, "mount", "-t", "tmpfs", "tmpfs", str(folder), cwd="/"))
        covered.append((host, folder))

    yield hide
    for host, folder in covered:
        execute(rig.on(host, "umount", str(folder), cwd="/"))


def test_data_that_a_host_lacks_is_named_with_the_host(rig, hidden, image_root, tmp_path):
    hidden("h2", image_root)
    words = typed(
        shown("mpirun -n 16 --host node1:8,node2:8"),
        image_root,
        tmp_path,
        **{"-n 16": "-n 2", "node1:8,node2:8": "h1:1,h2:1"},
    )
    one_line(run_on_h1(rig, words), "rank 1 on h2: data_path", "does not exist")


def test_the_launcher_names_hosts_that_it_cannot_use(rig, hidden):
    def launched(hosts):
        return run_on_h1(rig, ["python3", "scripts/launch.py", f"--hosts={hosts}", "train.py"])

    one_line(launched("h1:1,h9:1"), "host h9 cannot be reached by ssh", "resolve")
    hidden("h3", ROOT)
    one_line(launched("h1:1,h3:1"), "host h3 has no ", "same place")


def test_a_host_that_asks_for_a_password_is_named(rig, tmp_path):
    stranger = tmp_path / "ssh"
    stranger.write_text(
        "#!/bin/sh\nexec ssh -F none -o IdentityFile=/nowhere -o StrictHostKeyChecking=no -o "
        "UserKnownHostsFile=/dev/null "
        '-o LogLevel=ERROR "$@"\n'
    )
    stranger.chmod(0o755)
    words = rig.on("h1", "python3", "scripts/launch.py", "--hosts=h1:1,h2:1", "train.py", cwd=ROOT)
    run = execute(words, PRTE_MCA_plm_ssh_agent=str(stranger))
    one_line(run, "host h2 cannot be reached by ssh", "denied", "without a password")


STALL_S = 10


@pytest.fixture
def own_rig(tmp_path):
    """Two hosts for a test that breaks them; its processes go with them."""
    with Rig(tmp_path, 2) as rig:
        yield rig


def start_training(rig, image_root, folder, *added):
    """A long run with one rank on each of two hosts, in its third epoch or later."""
    words = [
        "mpirun",
        "-n",
        "2",
        "--host",
        "h1:1,h2:1",
        "-x",
        "PATH",
        "python3",
        "train.py",
        "--run_distribute=1",
        "--threads=1",
        *TINY,
        f"--data_path={image_root}/train",
        f"--output_path={folder}/out",
        "--max_epoch=100000",
        "--ckpt_interval=5",
        f"--stall_timeout_s={STALL_S}",
        *added,
    ]
    started = Started(rig.on("h1", *words, cwd=ROOT), folder, **rig.environment)
    started.wait_for_text("epoch 3/100000 loss")
    return started


def eventually(condition, seconds=40):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_rank_that_is_killed_on_another_host_ends_the_job_everywhere(
    own_rig, image_root, tmp_path
):
    started = start_training(own_rig, image_root, tmp_path)
    for process, words in own_rig.processes("h2").items():
        if words.startswith("python3 train.py"):
            os.kill(process, signal.SIGKILL)
    run, _ = started.finish(60)
    assert run.status != 0 and "h2" in run.out + run.err, run
    eventually(lambda: not own_rig.processes("h1") and not own_rig.processes("h2"))


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_daemon_that_is_killed_is_no_success(own_rig, image_root, tmp_path, restarts):
    """Open MPI's own status is 0 then."""
    words = [
        "python3",
        "scripts/launch.py",
        "--hosts=h1:1,h2:1",
        f"--max_restarts={restarts}",
        "train.py",
        "--run_distribute=1",
        "--threads=1",
        *TINY,
        f"--data_path={image_root}/train",
        f"--output_path={tmp_path}/out",
        "--max_epoch=100",
        "--ckpt_interval=5",
    ]
    started = Started(own_rig.on("h1", *words, cwd=ROOT), tmp_path, **own_rig.environment)
    started.wait_for_text("epoch 10/100 loss")
    for process, line in own_rig.processes("h2").items():
        if line.split()[0].endswith("prted"):
            # A child that was about to become another program has its name too, for a moment.
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    run, _ = started.finish(120)
    if restarts:
        assert (
            run.status == 0
            and "starting again from the newest checkpoint" in run.out
            and "epoch 100/100 loss" in run.out
        ), run
    else:
        assert run.status not in (0, 2) and "epoch 100/100" not in run.out, run


@pytest.mark.parametrize("fault", ["cut", "power off"])
def test_a_host_that_is_lost_ends_the_job_and_is_named(own_rig, image_root, tmp_path, fault):
    started = start_training(own_rig, image_root, tmp_path)
    if fault == "cut":
        own_rig.link("h2", up=False)
    else:
        own_rig.power_off("h2")
    # The minute that docs/distributed.md promises for noticing, asking, and ending what waits for
    # the lost daemon.
    run, _ = started.finish(STALL_S + 60)
    assert (
        run.status != 0
        and len(run.error_lines) == 1
        and " on h2) gives no sign of life" in run.error_lines[0]
    ), run
    eventually(lambda: not own_rig.processes("h1"))
    if fault == "cut":
        eventually(lambda: not own_rig.processes("h2"))


def test_a_link_that_is_cut_for_five_seconds_costs_five_seconds(own_rig, image_root, tmp_path):
    started = start_training(own_rig, image_root, tmp_path)
    own_rig.link("h2", up=False)
    time.sleep(5)
    own_rig.link("h2", up=True)
    seen = started.output().count("loss")
    started.wait_for(lambda: started.output().count("loss") > seen + 5, timeout=30)
    started.kill()


@pytest.mark.parametrize("launcher", ["awake", "slow"])
def test_no_room_for_a_checkpoint_ends_the_job_on_every_host(
    own_rig, image_root, tmp_path, launcher
):
    """Rank 0's host has a full disk; its status counts, even if the launcher is slow to notice."""
    small = tmp_path / "out"
    small.mkdir()
    execute(
        own_rig.on("h1", "mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(small), cwd="/")
    )
    started = start_training(own_rig, image_root, tmp_path)
    if launcher == "slow":
        (first_rank,) = started.ranks()
        os.kill(started.process.pid, signal.SIGSTOP)
        eventually(lambda: state_of(first_rank) == "Z")
        time.sleep(1)
        # Its connection is closed, and the rank on the other host has not ended the job for that.
        assert any("train.py" in words for words in own_rig.processes("h2").values())
        os.kill(started.process.pid, signal.SIGCONT)
    run, _ = started.finish(60)
    assert run.status == 2 and len(run.error_lines) == 1 and "cannot write" in run.error_lines[0], (
        run
    )
    eventually(lambda: not own_rig.processes("h1") and not own_rig.processes("h2"))


def state_of(process):
    """The letter that proc(5) has for its state; Z if it has ended."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def start_restarting(rig, image_root, folder, hosts, *added, launcher=()):
    words = [
        "python3",
        "scripts/launch.py",
        f"--hosts={hosts}",
        "--max_restarts=3",
        *launcher,
        "train.py",
        "--run_distribute=1",
        "--threads=1",
        *TINY,
        f"--data_path={image_root}/train",
        f"--output_path={folder}/out",
        "--max_epoch=40",
        "--ckpt_interval_steps=10",
        f"--stall_timeout_s={STALL_S}",
        "--lr=0.01",
        *added,
    ]
    started = Started(rig.on("h1", *words, cwd=ROOT), folder, **rig.environment)
    started.wait_for_text("epoch 4/40 loss")
    return started


def test_a_killed_rank_is_started_again_and_nothing_differs_in_the_end(
    own_rig, image_root, tmp_path
):
    undisturbed = run_on_h1(
        own_rig,
        [
            "mpirun",
            "-n",
            "2",
            "--host",
            "h1:1,h2:1",
            "-x",
            "PATH",
            "python3",
            "train.py",
            "--run_distribute=1",
            "--threads=1",
            *TINY,
            f"--data_path={image_root}/train",
            f"--output_path={tmp_path}/whole",
            "--max_epoch=40",
            "--lr=0.01",
            "--ckpt_interval_steps=10",
        ],
    )
    assert undisturbed.status == 0, undisturbed
    started = start_restarting(own_rig, image_root, tmp_path, "h1:1,h2:1")
    for process, words in own_rig.processes("h2").items():
        if "train.py" in words and "prted" not in words:
            os.kill(process, signal.SIGKILL)
    run, _ = started.finish(200)
    assert (
        run.status == 0 and "starting again from the newest checkpoint (3 restarts left)" in run.out
    ), run
    folder = only_run(tmp_path / "out")
    assert "starting again" in (folder / "log.txt").read_text()
    first, second = (
        read_weights(place / "latest.ckpt")[0] for place in (only_run(tmp_path / "whole"), folder)
    )
    for name, array in first.items():
        if name not in ("metadata", "checksum"):
            assert np.array_equal(array, second[name]), name


def test_a_lost_host_is_left_out_and_the_global_batch_stays(own_rig, image_root, tmp_path):
    started = start_restarting(own_rig, image_root, tmp_path, "h1:1,h2:1")
    own_rig.power_off("h2")
    run, _ = started.finish(300)
    assert (
        run.status == 0
        and "host h2 cannot be reached" in run.out
        and "continuing without it" in run.out
    ), run
    lines = [
        json.loads(line)
        for line in (only_run(tmp_path / "out") / "metrics.jsonl").read_text().splitlines()
    ]
    # 48 images, 8 a step, whether by two ranks or one
    assert [line["epoch"] for line in lines] == list(range(1, 41)) and lines[-1]["step"] == 240


def test_a_spare_host_takes_the_place_of_a_lost_one_and_nothing_differs_in_the_end(
    tmp_path, image_root
):
    with Rig(tmp_path, 3) as rig:
        undisturbed = run_on_h1(
            rig,
            [
                "python3",
                "scripts/launch.py",
                "--hosts=h1:1,h2:1",
                "train.py",
                "--run_distribute=1",
                "--threads=1",
                *TINY,
                f"--data_path={image_root}/train",
                f"--output_path={tmp_path}/whole",
                "--max_epoch=40",
                "--lr=0.01",
                "--ckpt_interval_steps=10",
            ],
        )
        assert undisturbed.status == 0, undisturbed
        started = start_restarting(
            rig, image_root, tmp_path, "h1:1,h2:1", launcher=("--spare_hosts=h9,h3",)
        )
        rig.power_off("h2")
        run, _ = started.finish(300)
    assert (
        run.status == 0 and "host h2 cannot be reached" in run.out and "h3 replaces it" in run.out
    ), run
    first, second = (
        read_weights(only_run(tmp_path / name) / "latest.ckpt")[0] for name in ("whole", "out")
    )
    assert all(
        np.array_equal(first[name], second[name])
        for name in first
        if name not in ("metadata", "checksum")
    )


@pytest.mark.parametrize(
    "hosts,message",
    [
        ("h1:x", "--hosts"),
        ("", "--hosts"),
        ("h1:2,h1:2", "twice"),
        ("h1:0", "--hosts"),
        ("h1,h2", None),
    ],
)
def test_hosts_are_read_or_refused_in_one_line(hosts, message):
    run = execute(["python3", "scripts/launch.py", f"--hosts={hosts}", "nowhere.py"])
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and (message or "nowhere.py") in run.error_lines[0]
    ), run


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--spare_hosts=h3"], "--max_restarts"),
        (["--max_restarts=1", "--spare_hosts=h2"], "h2"),
        (["--max_restarts=1", "--spare_hosts=h3:x"], "--spare_hosts"),
    ],
)
def test_spare_hosts_are_refused_in_one_line(flags, message):
    run = execute(["python3", "scripts/launch.py", "--hosts=h1,h2", *flags, "nowhere.py"])
    assert run.status == 2 and len(run.error_lines) == 1 and message in run.error_lines[0], run
