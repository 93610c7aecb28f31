"""Start ranks under mpirun, each on its own cores:

    python3 scripts/launch.py --nproc_per_node=8 [--visible_devices=0,1,..] [--env_sh=FILE] [--server_id=HOST]
        [--mode=train|test] SCRIPT ARGS...
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments):
    options = parse(arguments)
    script = find_script(options.script, options.mode)
    environment = launch_environment(options)
    command = mpirun_command(options, script, len(os.sched_getaffinity(0)))
    print(" ".join(command), flush=True)
    sys.exit(run(command, environment))


def run(command, environment):
    """Run ``command``, an mpirun; returns its status.

    SIGTERM and Ctrl-C reach the ranks as SIGUSR1, at which they save and end: mpirun passes that on without killing them.
    The status is then 128 + the signal's number. A second signal ends everything at once.
    """
    # In a session of its own, because a terminal sends Ctrl-C to every process of the foreground.
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    received = []

    def pass_on(number, frame):
        received.append(number)
        process.send_signal(signal.SIGUSR1 if len(received) == 1 else signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status = process.wait()
    return 128 + received[0] if received and status else status


def parse(arguments):
    """Options, script and the script's own arguments; ends the process with a usage line if they are wrong."""
    parser = argparse.ArgumentParser(description="Start ranks under mpirun, each on its own cores.",
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--nproc_per_node", "--nproc-per-node", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--visible_devices", default="", help="devices, as in 0,1,2,3; rank i takes the i-th")
    parser.add_argument("--env_sh", default="", help="shell file whose environment the ranks get")
    parser.add_argument("--server_id", default="",
                        help="this machine's address; accepted for the seed's sake: ranks of one machine need none")
    parser.add_argument("--mode", choices=("train", "test"), default="train")
    parser.add_argument("script")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.nproc_per_node < 1:
        fail(f"--nproc_per_node must be at least 1, got {options.nproc_per_node}")
    devices = [device for device in options.visible_devices.split(",") if device]
    if not all(device.isdigit() for device in devices):
        fail(f"--visible_devices must be numbers with commas, got '{options.visible_devices}'")
    if devices and len(devices) < options.nproc_per_node:
        fail(f"--visible_devices names {len(devices)} devices for --nproc_per_node={options.nproc_per_node} ranks")
    return options


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
    """The mpirun command: the machine's cores divided evenly, shared only where ranks outnumber them."""
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if mpirun is None:
        fail("mpirun is not installed; run 'bash scripts/setup.sh', then 'source .venv/bin/activate'")
    ranks = options.nproc_per_node
    share = cores // ranks
    placement = ["--map-by", f"slot:PE={share}", "--bind-to", "core"] if share else [
        "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    return [mpirun, "-n", str(ranks), *placement, sys.executable, script, *options.script_arguments]


def fail(message):
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
