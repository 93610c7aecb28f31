"""Start ranks under mpirun, each on its own cores:

    python3 scripts/launch.py --nproc_per_node=8 [--visible_devices=0,1,..] [--env_sh=FILE] [--server_id=HOST]
        [--mode=train|test] SCRIPT ARGS...
    python3 scripts/launch.py --hosts=HOST:RANKS,HOST:RANKS... SCRIPT ARGS...
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SENT_SIGNAL_FILE = "ACNET_SENT_SIGNAL_FILE"
# Time for the ranks to finish their step and save; then for mpirun to end them.
STOP_S, KILL_S, EMPTY_S = 120.0, 10.0, 2.0
# Open MPI's setting of the command that reaches other hosts; and how long they may take to answer.
SSH_AGENT = "PRTE_MCA_plm_ssh_agent"
ANSWER_S = 10
LOOK_S = 0.05


def main(arguments):
    options = parse(arguments)
    script = find_script(options.script, options.mode)
    environment = launch_environment(options)
    if options.hosts:
        check_hosts(list(options.hosts), script)
    command = mpirun_command(options, script, len(os.sched_getaffinity(0)))
    print(" ".join(command), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(command, environment, Path(folder) / "signal"))


def run(command, environment, sent_signal_file):
    """Run ``command``, an mpirun; returns its status.

    SIGTERM, SIGUSR1 and Ctrl-C reach the ranks as SIGUSR1, at which they save and end: mpirun passes that on without killing them.
    The status is then 128 + the signal's number. Ranks that have not ended after STOP_S, or a second signal, get SIGTERM, and
    after KILL_S more whatever is left of the job is killed.

    Args:
        sent_signal_file: where ranks find the number of the signal that was sent.
    """
    received = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    # In a session of its own, because a terminal sends Ctrl-C to every process of the foreground.
    process = subprocess.Popen(command, env={**environment, SENT_SIGNAL_FILE: str(sent_signal_file)}, stdin=subprocess.DEVNULL,
                               start_new_session=True)
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
    return 128 + received[0] if received and status else status


def escalation(process, received, sent_signal_file):
    """Do what is to be done to stop the job, from gentle to harsh; yields the seconds to wait after each."""
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
    """Process numbers of a session, without those that have ended and are not waited for."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, _, of_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state not in "ZX":
                found.add(int(entry.name))
    return found


def parse(arguments):
    """Options, script and the script's own arguments; ends the process with a usage line if they are wrong."""
    parser = argparse.ArgumentParser(description="Start ranks under mpirun, each on its own cores.",
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--nproc_per_node", "--nproc-per-node", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--hosts", default=None, help="ranks on several machines, as in node1:8,node2:8; reached by ssh")
    parser.add_argument("--visible_devices", default="", help="devices, as in 0,1,2,3; rank i takes the i-th")
    parser.add_argument("--env_sh", default="", help="shell file whose environment the ranks get")
    parser.add_argument("--server_id", default="",
                        help="this machine's address; accepted for the seed's sake: ranks of one machine need none")
    parser.add_argument("--mode", choices=("train", "test"), default="train")
    parser.add_argument("script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    options.hosts = parse_hosts(options.hosts) if options.hosts is not None else {}
    if options.nproc_per_node < 1:
        fail(f"--nproc_per_node must be at least 1, got {options.nproc_per_node}")
    devices = [device for device in options.visible_devices.split(",") if device]
    if not all(device.isdigit() for device in devices):
        fail(f"--visible_devices must be numbers with commas, got '{options.visible_devices}'")
    if devices and len(devices) < options.nproc_per_node:
        fail(f"--visible_devices names {len(devices)} devices for --nproc_per_node={options.nproc_per_node} ranks")
    return options


def parse_hosts(text):
    """{host: ranks} of HOST:RANKS,HOST:RANKS...; one rank where no number is given."""
    hosts = {}
    for entry in text.split(","):
        host, _, ranks = entry.strip().rpartition(":") if ":" in entry else (entry.strip(), "", "1")
        if not host or host.startswith("-") or not ranks.isdigit() or int(ranks) < 1:
            fail(f"--hosts must be HOST:RANKS,HOST:RANKS..., got '{text}'")
        if host in hosts:
            fail(f"--hosts names {host} twice")
        hosts[host] = int(ranks)
    return hosts


def check_hosts(hosts, script):
    """End with one line if a host cannot be reached by ssh without a question, or lacks this folder, Python or script."""
    wanted = [("folder", "-d", os.getcwd()), ("Python", "-x", sys.executable), ("script", "-f", os.path.abspath(script))]
    tests = "; ".join(f"test {flag} {shlex.quote(path)} || echo {what}" for what, flag, path in wanted)
    agent = shlex.split(os.environ.get(SSH_AGENT, "ssh"))
    others = [host for host in hosts if host not in (socket.gethostname(), "localhost")]
    asked = [subprocess.Popen([*agent, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_S}", host, tests], text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for host in others]
    for host, process in zip(others, asked):
        out, err = process.communicate()
        if process.returncode == 255:
            reason = (err.strip().splitlines() or ["no reason given"])[-1].strip()
            hint = "; it must work without a password, as by ssh-copy-id" if "denied" in reason else ""
            fail(f"host {host} cannot be reached by ssh: {reason}{hint}")
        for what, _, path in wanted:
            if what in out.split():
                fail(f"host {host} has no {what} {path}; every host needs the project at the same place")


def find_script(script, mode):
    """The script to run; the AlexNet seed's test.py is eval.py here, and needs no edit of the network."""
    if os.path.isfile(script):
        return script
    if mode == "test" and os.path.basename(script) == "test.py":
        return str(ROOT / "eval.py")
    return fail(f"script '{script}' does not exist")


def launch_environment(options):
    """This process's environment after ``--env_sh``, with the visible devices and what Open MPI asks of root."""
    environment = dict(os.environ)
    if options.env_sh:
        if not os.path.isfile(options.env_sh):
            fail(f"--env_sh '{options.env_sh}' does not exist")
        sourced = subprocess.run(["bash", "-c", 'set -e; source "$1" >&2; env -0', "bash", os.path.abspath(options.env_sh)],
                                 stdout=subprocess.PIPE, check=False)
        if sourced.returncode:
            fail(f"--env_sh '{options.env_sh}' ended with status {sourced.returncode}")
        environment = dict(entry.split("=", 1) for entry in sourced.stdout.decode().split("\0") if "=" in entry)
    if options.visible_devices:
        environment["CUDA_VISIBLE_DEVICES"] = environment["ASCEND_RT_VISIBLE_DEVICES"] = options.visible_devices
    environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return environment


def mpirun_command(options, script, cores):
    """The mpirun command: the machine's cores divided evenly, shared only if ranks outnumber them."""
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if mpirun is None:
        fail("mpirun is not installed; run 'bash scripts/setup.sh', then 'source .venv/bin/activate'")
    command = [sys.executable, script, *options.script_arguments]
    if options.hosts:
        # Unbound, because machines may differ: each rank takes its share of its machine's cores itself (src/parallel/placement.py).
        hosts = ",".join(f"{host}:{ranks}" for host, ranks in options.hosts.items())
        return [mpirun, "-n", str(sum(options.hosts.values())), "--host", hosts, "--map-by", "slot", "--bind-to", "none",
                *(word for name in passed_on(options) for word in ("-x", name)), *command]
    ranks = options.nproc_per_node
    share = cores // ranks
    placement = ["--map-by", f"slot:PE={share}", "--bind-to", "core"] if share else [
        "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
    return [mpirun, "-n", str(ranks), *placement, *command]


def passed_on(options):
    """Names of the variables that ranks of other machines need besides those of Open MPI."""
    environment = launch_environment(options)
    changed = [name for name in environment if environment[name] != os.environ.get(name)]
    return sorted({"PATH", *(name for name in changed if not name.startswith(("OMPI_", "PRTE_", "BASH_")) and name not in ("_", "SHLVL"))})


def fail(message):
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
