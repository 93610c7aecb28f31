"""Several hosts on one Linux machine.

Network namespaces on one bridge, each with a host name, an address, /dev/shm and an ssh server.

Files are shared, as on a cluster. Needs root, iproute2, openssh-server, openssh-client and
util-linux; ``missing`` says what is not here.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

# Several processes, and fixtures of one, may have hosts at a time.
_MADE = itertools.count()
_SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
_PATIENCE_S = 10


def missing():
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    absent = [
        name
        for name in ("ip", "tc", "ssh", "ssh-keygen", "nsenter", "unshare", _SSHD)
        if shutil.which(name) is None
    ]
    if absent:
        return (
            f"not installed: {', '.join(absent)} (Debian: iproute2, openssh-server, openssh-client)"
        )
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True
    )
    return f"the system refuses namespaces: {probe.stderr.strip()}" if probe.returncode else None


class Rig:
    """A context with the hosts h1 to hN; ``folder`` keeps keys and logs."""

    def __init__(self, folder, count):
        number = (os.getpid() * 16 + next(_MADE)) % 16384
        self._bridge, self._network = f"rig{number}n", f"10.{64 + number // 256}.{number % 256}"
        self._folder, self._names = Path(folder), [f"h{number}" for number in range(1, count + 1)]
        self._holders = {}

    def __enter__(self):
        try:
            self._make_keys()
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "link", "set", self._bridge, "up")
            for number, name in enumerate(self._names, 1):
                self._make_host(number, name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for number, name in enumerate(self._names, 1):
            found = subprocess.run(
                ["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True
            ).stdout.split()
            for process in found:
                with contextlib.suppress(OSError):
                    os.kill(int(process), signal.SIGKILL)
            if name in self._holders:
                self._holders[name].wait()
            for command in (
                ["netns", "del", self._namespace(name)],
                ["link", "del", f"{self._bridge}{number}"],
            ):
                subprocess.run(["ip", *command], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self._namespace(name), ignore_errors=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    def on(self, name, *command, cwd):
        """The words that run ``command`` on host ``name``."""
        return [
            "nsenter",
            "-t",
            str(self._holders[name].pid),
            "--net",
            "--uts",
            "--mount",
            f"--wd={cwd}",
            *command,
        ]

    def link(self, name, up):
        """Connect or cut host ``name``."""
        _run("ip", "link", "set", f"{self._bridge}{name[1:]}", "up" if up else "down")

    def limit(self, rate):
        """Let no host send or receive faster than ``rate`` (as tc writes it, "1gbit").

        None takes the limit away.
        """
        for number, name in enumerate(self._names, 1):
            for prefix, device in (
                ([], f"{self._bridge}{number}"),
                (["ip", "netns", "exec", self._namespace(name)], "eth0"),
            ):
                subprocess.run(
                    [*prefix, "tc", "qdisc", "del", "dev", device, "root"], capture_output=True
                )
                if rate is not None:
                    # A token bucket; netem, which has delays, is not in every kernel.
                    _run(
                        *prefix,
                        "tc",
                        "qdisc",
                        "add",
                        "dev",
                        device,
                        "root",
                        "tbf",
                        "rate",
                        rate,
                        "burst",
                        "256k",
                        "latency",
                        "50ms",
                    )

    def processes(self, name):
        """{process number: command line} of what runs on host ``name``, its ssh server apart."""
        found = {}
        for process in subprocess.run(
            ["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True
        ).stdout.split():
            with contextlib.suppress(OSError):
                words = (
                    (Path("/proc") / process / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                )
                if words and "sshd" not in words.split(" ")[0]:
                    found[int(process)] = words
        return found

    def power_off(self, name):
        """Take host ``name`` away, with everything that runs on it, without a word to anybody."""
        self.link(name, up=False)
        for process in subprocess.run(
            ["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True
        ).stdout.split():
            with contextlib.suppress(OSError):
                os.kill(int(process), signal.SIGKILL)
        self._holders.pop(name).wait()
        subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._bridge}{name[1:]}"], capture_output=True)

    def power_on(self, name):
        """Bring back a host that ``power_off`` took away; nothing runs on it."""
        (self._folder / f"{name}.pid").unlink(missing_ok=True)
        self._make_host(int(name[1:]), name)

    @property
    def environment(self):
        """Lets mpirun reach the hosts with the rig's key, without the user's ssh configuration."""
        return {"PRTE_MCA_plm_ssh_agent": str(self._folder / "ssh")}

    def _namespace(self, name):
        return f"{self._bridge}-{name}"

    def _make_keys(self):
        for key in ("user", "host"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / key))
        shutil.copy(self._folder / "user.pub", self._folder / "authorized")
        (self._folder / "authorized").chmod(0o600)
        ssh = self._folder / "ssh"
        ssh.write_text(
            f"#!/bin/sh\nexec ssh -i {self._folder}/user -o StrictHostKeyChecking=no -o "
            "UserKnownHostsFile=/dev/null "
            '-o LogLevel=ERROR -o BatchMode=yes "$@"\n'
        )
        ssh.chmod(0o755)

    def _make_host(self, number, name):
        inside, port, address = (
            self._namespace(name),
            f"{self._bridge}{number}",
            f"{self._network}.{number}",
        )
        own = Path("/etc/netns") / inside
        own.mkdir(parents=True, exist_ok=True)
        (own / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{self._network}.{i} {n}\n" for i, n in enumerate(self._names, 1))
        )
        _run("ip", "netns", "add", inside)
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", inside)
        _run("ip", "link", "set", port, "master", self._bridge, "up")
        # The same after its power was off, because the other hosts remember it.
        hardware = f"02:00:00:00:00:{number:02x}"
        for command in (
            ["link", "set", "eth0", "address", hardware],
            ["addr", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            _run("ip", "-n", inside, *command)
        files = {key: self._folder / f"{name}.{key}" for key in ("pid", "conf", "log")}
        files["conf"].write_text(
            f"ListenAddress {address}\nHostKey {self._folder}/host\nAuthorizedKeysFile "
            f"{self._folder}/authorized\n"
            f"PermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile {files['pid']}\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        server = (
            f"hostname {name}; mount -t tmpfs tmpfs /dev/shm; exec {_SSHD} -D -f {files['conf']} "
            f"-E {files['log']}"
        )
        self._holders[name] = subprocess.Popen(
            ["ip", "netns", "exec", inside, "unshare", "--uts", "--mount", "bash", "-c", server],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + _PATIENCE_S
        while not files["pid"].exists():
            assert time.monotonic() < deadline, (
                f"no ssh server on {name}: "
                f"{files['log'].read_text() if files['log'].exists() else ''}"
            )
            time.sleep(0.05)


def _run(*command):
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, f"{' '.join(command)}: {finished.stderr}"
