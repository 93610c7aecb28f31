"""SLURM on the hosts of a Rig: its own daemons, as Debian packages them.

``missing`` says what is not here.
"""

import shutil
import subprocess
import time
from pathlib import Path

_PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE_S = 30


def missing():
    """Why there can be no SLURM here, or None."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if not absent and not list(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so")):
        absent = ["libpmix.so, which srun's plug-in opens"]
    return (
        f"not installed: {', '.join(absent)} (Debian: slurmctld, slurmd, slurm-client, munge, "
        "libpmix-dev)"
        if absent
        else None
    )


class Slurm:
    """A context in which the hosts ``names`` of ``rig`` are a cluster of ``cpus`` processors each.

    The first has the controller.
    """

    def __init__(self, rig, names, folder, cpus):
        self._rig, self._names, self._folder, self._cpus = rig, names, Path(folder), cpus
        self._daemons = []

    def __enter__(self):
        try:
            self._write_configuration()
            self._start_munge()
            self._start(self._names[0], "slurmctld", "-D", "-i", "-f", self._folder / "slurm.conf")
            for name in self._names:
                self._start(name, "slurmd", "-D", "-N", name, "-f", self._folder / "slurm.conf")
            deadline = time.monotonic() + _PATIENCE_S
            while self.run("sinfo", "-h", "-o", "%t %D").stdout.split() != [
                "idle",
                str(len(self._names)),
            ]:
                assert time.monotonic() < deadline, self.run("sinfo").stdout + self._logs()
                time.sleep(0.5)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        self.run("scancel", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *words, cwd="/", **environment):
        """Run a command of SLURM on the first host."""
        setting = [
            "env",
            f"SLURM_CONF={self._folder}/slurm.conf",
            *(f"{name}={value}" for name, value in environment.items()),
        ]
        return subprocess.run(
            self._rig.on(self._names[0], *setting, *map(str, words), cwd=cwd),
            capture_output=True,
            text=True,
        )

    def _write_configuration(self):
        nodes = ",".join(self._names)
        (self._folder / "state").mkdir()
        (self._folder / "local").mkdir()
        for name in self._names:
            # PMIx makes files of the same names on every node.
            subprocess.run(
                self._rig.on(
                    name, "mount", "-t", "tmpfs", "tmpfs", str(self._folder / "local"), cwd="/"
                ),
                check=True,
            )
        lines = {
            "ClusterName": "rig",
            "SlurmctldHost": self._names[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._folder}/munge.socket",
            "CredType": "cred/munge",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/affinity",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "ReturnToService": "2",
            "SlurmdParameters": "config_overrides",
            "StateSaveLocation": self._folder / "state",
            "SlurmdSpoolDir": self._folder / "spool-%n",
            "SlurmctldPidFile": self._folder / "ctld.pid",
            "SlurmdPidFile": self._folder / "slurmd-%n.pid",
            "SlurmctldLogFile": self._folder / "ctld.log",
            "SlurmdLogFile": self._folder / "slurmd-%n.log",
            "TmpFS": self._folder / "local",
            "JobRequeue": "1",
            "KillWait": "30",
            "SchedulerParameters": "sched_interval=3,bf_interval=3",
        }
        text = "\n".join(f"{name}={value}" for name, value in lines.items())
        text += f"\nNodeName={nodes} CPUs={self._cpus} State=UNKNOWN\n"
        text += f"PartitionName=all Nodes={nodes} Default=YES MaxTime=INFINITE State=UP\n"
        (self._folder / "slurm.conf").write_text(text)
        # Where there are no control groups to be found by itself.
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in self._names:
            (self._folder / f"spool-{name}").mkdir()

    def _start_munge(self):
        key = self._folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        self._folder.chmod(0o755)
        files = [
            f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "log", "pid", "seed")
        ]
        self._daemons.append(
            subprocess.Popen(
                [
                    "munged",
                    "--foreground",
                    "--force",
                    f"--socket={self._folder}/munge.socket",
                    *files,
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def _start(self, name, *words):
        self._daemons.append(
            subprocess.Popen(
                self._rig.on(name, *map(str, words), cwd="/"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def _logs(self):
        return "".join(
            f"\n{log.name}\n{log.read_text()[-2000:]}" for log in self._folder.glob("*.log")
        )
