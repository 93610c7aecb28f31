"""The machines that scripts/launch.py starts ranks on: their names, and whether they work."""

import os
import shlex
import socket
import subprocess
import sys

# Open MPI's setting of the command that reaches other hosts; and how long they may take to answer.
SSH_AGENT = "PRTE_MCA_plm_ssh_agent"
ANSWER_S = 10


def parse_hosts(text, flag="--hosts"):
    """{host: ranks} of HOST:RANKS,HOST:RANKS...; one rank if no number is given.

    Raises:
        ValueError: says what is wrong.
    """
    hosts = {}
    for entry in text.split(","):
        host, _, ranks = entry.strip().rpartition(":") if ":" in entry else (entry.strip(), "", "1")
        if not host or host.startswith("-") or not ranks.isdigit() or int(ranks) < 1:
            raise ValueError(f"{flag} must be HOST:RANKS,HOST:RANKS..., got '{text}'")
        if host in hosts:
            raise ValueError(f"{flag} names {host} twice")
        hosts[host] = int(ranks)
    return hosts


def unusable(hosts, script):
    """{host: reason} of hosts that ssh cannot reach without a question, or that lack a file."""
    wanted = [
        ("folder", "-d", os.getcwd()),
        ("Python", "-x", sys.executable),
        ("script", "-f", os.path.abspath(script)),
    ]
    tests = "; ".join(
        f"test {flag} {shlex.quote(path)} || echo {what}" for what, flag, path in wanted
    )
    agent = shlex.split(os.environ.get(SSH_AGENT, "ssh"))
    asked = {
        host: subprocess.Popen(
            [*agent, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_S}", host, tests],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for host in hosts
        if host not in (socket.gethostname(), "localhost")
    }
    found = {}
    for host, process in asked.items():
        out, err = process.communicate()
        lacking = [f"{what} {path}" for what, _, path in wanted if what in out.split()]
        if process.returncode == 255:
            reason = (err.strip().splitlines() or ["no reason given"])[-1].strip()
            hint = (
                "; it must work without a password (see ssh-copy-id)" if "denied" in reason else ""
            )
            found[host] = f"host {host} cannot be reached by ssh: {reason}{hint}"
        elif lacking:
            found[host] = (
                f"host {host} has no {lacking[0]}; every host needs the project at the same place"
            )
    return found


def share_out(hosts, ranks):
    """``hosts``, {host: ranks}, with ``ranks`` ranks in all, taken from the first ones."""
    shared = {}
    for host, count in hosts.items():
        if ranks > 0:
            shared[host] = min(count, ranks)
            ranks -= shared[host]
    return shared
