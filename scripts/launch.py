"""Start ranks under mpirun, each on its own cores:

    python3 scripts/launch.py --nproc_per_node=8 [--visible_devices=0,1,..] [--env_sh=FILE]
        [--server_id=HOST] [--mode=train|test] SCRIPT ARGS...
    python3 scripts/launch.py --hosts=HOST:RANKS,HOST:RANKS... [--max_restarts=3]
        [--spare_hosts=HOST,HOST...] SCRIPT ARGS...

The second form starts ranks on several machines.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from remote_hosts import parse_hosts, share_out, unusable

ROOT = Path(__file__).resolve().parents[1]
SENT_SIGNAL_FILE = "ACNET_SENT_SIGNAL_FILE"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Time for the ranks to finish their step and save; then for mpirun to end them.
STOP_S, KILL_S, EMPTY_S = 120.0, 10.0, 2.0
# FACTS_FILE: where a run writes what a restart needs. USER_ERROR: the status of an error that only
# a person can correct. RETURN_S: when to check lost hosts again.
FACTS_FILE = "ACNET_FACTS_FILE"
# The user's limit of the processor's instructions, which must be the same for all ranks. A process
# of this program that starts others keeps it under the first name (src/utils/device.py).
_ISA_LIMITS = ("ACNET_KERNELS_ISA", "ONEDNN_MAX_CPU_ISA")
STATE_ENDING = ".state"
USER_ERROR = 2
RETURN_S = (3, 10, 20)
LOOK_S = 0.05
# The paragraph in which mpirun reports the status of a rank.
RULE, BANNER_LINES = b"-" * 60, 20
NONZERO_STATUS = b"exited with non-zero status"


def main(arguments):
    options = parse(arguments)
    script = find_script(options.script, options.mode)
    environment = launch_environment(options)
    for reason in unusable(options.hosts, script).values():
        fail(reason)
    # Where the ranks of all hosts may see it, if they share a folder at all.
    shared = os.getcwd() if options.hosts and os.access(os.getcwd(), os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".launch-", dir=shared) as folder:
        asked_for = environment.get(FACTS_FILE)
        facts = Path(folder) / "facts"
        environment[FACTS_FILE] = str(facts)
        status = run_with_restarts(options, script, environment, Path(folder) / "signal")
        if asked_for and facts.is_file():
            shutil.copyfile(facts, asked_for)
        sys.exit(status)


def run_with_restarts(options, script, environment, sent_signal_file):
    """Run the job, and again after failures, up to ``options.max_restarts`` times.

    Does not restart after a signal to this program, or after an error that the user must fix
    (status 2).
    """
    restarts_left = options.max_restarts
    while True:
        command = mpirun_command(options, script, len(os.sched_getaffinity(0)), environment)
        if not options.quiet:
            print(" ".join(command), flush=True)
        state_file = Path(environment[FACTS_FILE] + STATE_ENDING)
        state_file.unlink(missing_ok=True)
        status, received = run(command, environment, sent_signal_file)
        if status == 0 and state_file.is_file() and state_file.read_text() == "begun":
            # Open MPI 5.0 exits with status 0 when its daemon on another host is killed.
            sys.stderr.write("error: mpirun ended with status 0 although the job had not ended\n")
            status = 1
        if status in (0, USER_ERROR) or received or not restarts_left:
            if options.max_restarts and status not in (0, USER_ERROR) and not received:
                sys.stderr.write(
                    f"error: the job ended with status {status} and no restarts are left; "
                    "continue with the same command and --resume="
                    f"{read_facts(environment).get('run_folder', 'auto')}\n"
                )
            return status
        prepare_restart(options, script, read_facts(environment), status, restarts_left)
        restarts_left -= 1


def read_facts(environment):
    """What the run has told; {} if it has not begun."""
    facts_file = Path(environment[FACTS_FILE])
    return json.loads(facts_file.read_text()) if facts_file.is_file() else {}


def prepare_restart(options, script, facts, status, restarts_left):
    """Change ``options`` so that the job continues on the hosts that are left.

    It starts from its newest checkpoint, with the same global batch.
    """
    parts = [f"the job ended with status {status}"]
    lost = wait_for_hosts(options.hosts, script)
    for host in list(lost):
        spare = take_spare(options, host, script)
        if spare:
            parts.append(f"{lost.pop(host)}; {spare} replaces it")
    if lost:
        parts += [f"{reason}; continuing without it" for reason in lost.values()]
        left = {host: ranks for host, ranks in options.hosts.items() if host not in lost}
        options.hosts = share_out(left, dividing_ranks(sum(left.values()), facts))
        if not options.hosts:
            fail("; ".join([*parts, "no host is left"]))
        if facts:
            # Keep the batch size that the first start found to fit.
            options.script_arguments += [
                f"--global_batch_size={facts['global_batch_size']}",
                "--fit_batch=0",
            ]
    if facts and any(Path(facts["run_folder"]).glob("ckpt_0/*.ckpt")):
        # Not --resume=auto: another run under the same output_path may be newer.
        options.script_arguments.append(f"--resume={facts['run_folder']}")
        parts.append("starting again from the newest checkpoint")
    else:
        parts.append("starting from scratch: there is no checkpoint yet")
    text = f"{'; '.join(parts)} ({restarts_left} restarts left)"
    print(text, flush=True)
    with (
        contextlib.suppress(KeyError, OSError),
        open(Path(facts["run_folder"]) / "log.txt", "a", encoding="utf-8") as log,
    ):
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')},000 {text}\n")


def take_spare(options, lost, script):
    """Replace ``lost`` by the first spare host that works.

    Returns its name, or None without one.
    """
    while options.spare_hosts:
        spare = options.spare_hosts.pop(0)
        if not unusable({spare: options.hosts[lost]}, script):
            # In the same place, so that every rank keeps its number.
            options.hosts = {
                spare if host == lost else host: ranks for host, ranks in options.hosts.items()
            }
            return spare
    return None


def wait_for_hosts(hosts, script):
    """{host: reason} of the hosts that stay unusable; checks again at intervals."""
    for pause in RETURN_S:
        time.sleep(pause)
        lost = unusable(hosts, script)
        if not lost:
            return {}
    return lost


def dividing_ranks(most, facts):
    """The largest number of ranks up to ``most`` that divides the global batch evenly."""
    forward = facts["global_batch_size"] // facts["accumulation_steps"] if facts else 1
    return next((ranks for ranks in range(most, 0, -1) if not facts or forward % ranks == 0), 0)


def run(command, environment, sent_signal_file):
    """Run ``command``, an mpirun; returns its status, and the signals that this program received.

    SIGTERM, SIGUSR1 and Ctrl-C reach the ranks as SIGUSR1, at which they save and end: mpirun
    passes that on without killing them. The status is then 128 + the signal's number. Ranks that
    have not ended after STOP_S, or a second signal, get SIGTERM, and after KILL_S more whatever is
    left of the job is killed.

    Args:
        sent_signal_file: where ranks find the number of the signal that was sent.
    """
    received = []
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: received.append(number))
    # Whoever started this program may have blocked them, and left it so.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    # In a session of its own, because a terminal sends Ctrl-C to every process of the foreground.
    process = subprocess.Popen(
        command,
        env={**environment, SENT_SIGNAL_FILE: str(sent_signal_file)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    errors = threading.Thread(target=pass_on, args=(process.stderr, sys.stderr.buffer), daemon=True)
    errors.start()
    steps, deadline = iter(escalation(process, received, sent_signal_file)), 0.0
    while (status := process.poll()) is None:
        if received and (time.monotonic() > deadline or len(received) > 1):
            deadline = time.monotonic() + next(steps, KILL_S)
            del received[1:]
        if received and living(process.pid) <= {process.pid}:
            # An mpirun that was told so early that it does not notice the end of its ranks.
            deadline = min(deadline, time.monotonic() + EMPTY_S)
        time.sleep(LOOK_S)
    kill_session(process.pid)
    errors.join(EMPTY_S)
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    status = 128 - status if status < 0 else status
    return 128 + received[0] if received and status else status, received


def pass_on(source, target):
    """Copy what mpirun and the ranks write to standard error.

    After a rank has ended with an error, mpirun adds a paragraph between two lines of dashes. It is
    left out if the rank has said what is wrong.
    """
    has_error_line, held, reports = False, [], []
    for line in source:
        if line.startswith(b"error: "):
            has_error_line = True
            target.write(line)
        elif not held and not line.startswith(RULE):
            target.write(line)
        else:
            held.append(line)
            if len(held) > 1 and (line.startswith(RULE) or len(held) > BANNER_LINES):
                is_report = NONZERO_STATUS in b"".join(held)
                (reports.extend if is_report else target.writelines)(held)
                held = []
        target.flush()
    if not has_error_line:
        target.writelines(reports)
    target.writelines(held)
    target.flush()


def escalation(process, received, sent_signal_file):
    """Stop the job with growing force; yield the seconds to wait after each attempt."""
    sent_signal_file.write_text(str(int(received[0])))
    process.send_signal(signal.SIGUSR1)
    yield STOP_S
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    yield KILL_S
    kill_session(process.pid)


def kill_session(session):
    """Kill all processes of a session: the launcher starts each rank in a group of its own."""
    for process in living(session):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def living(session):
    """Process numbers of a session, without zombies."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, _, of_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state not in "ZX":
                found.add(int(entry.name))
    return found


def parse(arguments):
    """Options, script and the script's own arguments; ends the process with usage if wrong."""
    parser = argparse.ArgumentParser(
        description="Start ranks under mpirun, each on its own cores.", allow_abbrev=False
    )
    parser.error = fail
    parser.add_argument(
        "--nproc_per_node", "--nproc-per-node", type=int, default=1, help="ranks on this machine"
    )
    parser.add_argument(
        "--hosts",
        default=None,
        help="ranks on several machines, as in node1:8,node2:8; reached by ssh",
    )
    parser.add_argument(
        "--max_restarts",
        "--max-restarts",
        type=int,
        default=0,
        help="how often to start again after a failure",
    )
    parser.add_argument(
        "--spare_hosts",
        "--spare-hosts",
        default=None,
        help="hosts that take the place of lost ones, as in node3,node4",
    )
    parser.add_argument(
        "--visible_devices", default="", help="devices, as in 0,1,2,3; rank i takes the i-th"
    )
    parser.add_argument("--env_sh", default="", help="shell file whose environment the ranks get")
    parser.add_argument(
        "--server_id",
        default="",
        help="this machine's address; accepted for the seed's commands, but not used",
    )
    parser.add_argument("--quiet", action="store_true", help="do not print the mpirun command")
    parser.add_argument("--mode", choices=("train", "test"), default="train")
    parser.add_argument("script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    try:
        options.hosts = parse_hosts(options.hosts) if options.hosts is not None else {}
        options.spare_hosts = (
            list(parse_hosts(options.spare_hosts, "--spare_hosts"))
            if options.spare_hosts is not None
            else []
        )
    except ValueError as failure:
        fail(str(failure))
    if options.spare_hosts and not (options.hosts and options.max_restarts):
        fail("--spare_hosts needs --hosts and --max_restarts")
    for host in options.spare_hosts:
        if host in options.hosts:
            fail(f"--spare_hosts names {host}, which is one of --hosts")
    if options.max_restarts < 0:
        fail(f"--max_restarts must be 0 or more, got {options.max_restarts}")
    if options.nproc_per_node < 1:
        fail(f"--nproc_per_node must be at least 1, got {options.nproc_per_node}")
    devices = [device for device in options.visible_devices.split(",") if device]
    if not all(device.isdigit() for device in devices):
        fail(f"--visible_devices must be numbers with commas, got '{options.visible_devices}'")
    if devices and len(devices) < options.nproc_per_node:
        fail(
            f"--visible_devices names {len(devices)} devices for "
            f"--nproc_per_node={options.nproc_per_node} ranks"
        )
    return options


def find_script(script, mode):
    """The script to run. Those of this program are found from every folder.

    The AlexNet seed's test.py is eval.py here, without edits of the network.
    """
    for path in (script, ROOT / script):
        if os.path.isfile(path):
            return str(path)
    if mode == "test" and os.path.basename(script) == "test.py":
        return str(ROOT / "eval.py")
    return fail(f"script '{script}' does not exist")


def launch_environment(options):
    """This process's environment after ``--env_sh``, with the visible devices, for Open MPI."""
    environment = dict(os.environ)
    if options.env_sh:
        if not os.path.isfile(options.env_sh):
            fail(f"--env_sh '{options.env_sh}' does not exist")
        sourced = subprocess.run(
            [
                "bash",
                "-c",
                'set -e; source "$1" >&2; env -0',
                "bash",
                os.path.abspath(options.env_sh),
            ],
            stdout=subprocess.PIPE,
            check=False,
        )
        if sourced.returncode:
            fail(f"--env_sh '{options.env_sh}' ended with status {sourced.returncode}")
        environment = dict(
            entry.split("=", 1) for entry in sourced.stdout.decode().split("\0") if "=" in entry
        )
    if options.visible_devices:
        environment["CUDA_VISIBLE_DEVICES"] = environment["ASCEND_RT_VISIBLE_DEVICES"] = (
            options.visible_devices
        )
    environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return environment


def mpirun_command(options, script, cores, environment=os.environ):
    """The mpirun command.

    Ranks divide the machine's cores evenly, and share them only if too many.
    """
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if mpirun is None:
        fail(
            "mpirun is not installed; run 'bash scripts/setup.sh', then 'source .venv/bin/activate'"
        )
    command = [sys.executable, script, *options.script_arguments]
    if options.hosts:
        # Unbound, because machines may differ: each rank takes its share of its machine's cores
        # itself (src/utils/machine.py).
        hosts = ",".join(f"{host}:{ranks}" for host, ranks in options.hosts.items())
        return [
            mpirun,
            "-n",
            str(sum(options.hosts.values())),
            "--host",
            hosts,
            "--map-by",
            "slot",
            "--bind-to",
            "none",
            *(word for name in passed_on(environment) for word in ("-x", name)),
            *command,
        ]
    ranks = options.nproc_per_node
    share = cores // ranks
    placement = (
        ["--map-by", f"slot:PE={share}", "--bind-to", "core"]
        if share
        else ["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
    )
    return [mpirun, "-n", str(ranks), *placement, *command]


def passed_on(environment):
    """Names of the variables that ranks of other machines need besides those of Open MPI."""
    changed = [name for name in environment if environment[name] != os.environ.get(name)]
    of_others = [
        name
        for name in changed
        if not name.startswith(("OMPI_", "PRTE_", "BASH_")) and name not in ("_", "SHLVL")
    ]
    limit = next((name for name in _ISA_LIMITS if name in environment), None)
    limits = [limit] if limit and environment[limit] else []
    return sorted({"PATH", SENT_SIGNAL_FILE, FACTS_FILE, *limits, *of_others})


def fail(message):
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
