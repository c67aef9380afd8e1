"""A real Slurm of one node, run by hand from a folder of its own: no systemd, no cgroups, no
accounting. Needs Debian's slurm-wlm and munge, and root."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.drills.drill_cluster import free_port, wait_for

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits as long as its credential lives: 120 s otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# The node is said to have more cores than it may have: the tests are about order, not speed.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=600
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory_mb} State=UNKNOWN
PartitionName=here Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What Slurm lacks on this machine; empty where nothing."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    lacking = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=path)]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


@dataclass(frozen=True)
class Here:
    """A running Slurm, and the commands that talk to it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def ask(self, *command: str, text: str | None = None) -> str:
        """A command's output. ``RuntimeError`` with what it said where it fails."""
        done = subprocess.run(
            command, env=self.environment, input=text, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout + done.stderr

    def submit(self, file: str, *options: str) -> str:
        """The number of a job."""
        return self.ask("sbatch", "--parsable", *options, text=file).split(";")[0].strip()

    def states(self, job: str) -> dict[str, str]:
        """State of a job, or of each of its tasks, by number."""
        lines = self.ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").splitlines()
        return {words[0]: words[1] for words in map(str.split, lines) if words}

    def wait(self, job: str, seconds: float, *states: str) -> dict[str, str]:
        """Wait until all tasks are in one of some states. ``TimeoutError`` with those they are."""
        until = time.monotonic() + seconds
        while set(found := self.states(job).values()) - set(states) or not found:
            if time.monotonic() > until:
                raise TimeoutError(f"job {job}: {self.states(job)}\n{self.logs()}")
            time.sleep(0.3)
        return self.states(job)

    def logs(self) -> str:
        """The last lines of the daemons and of the jobs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {f.name}\n{f.read_text()[-2000:]}" for f in files)


@contextmanager
def slurm(folder: Path, cores: int = 4, memory_mb: int = 16_000) -> Iterator[Here]:
    """Start munged, slurmctld and slurmd, and end them with every job."""
    here = Here(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in _daemons(here, cores, memory_mb):
            with open(folder / f"{command[0]}.out.log", "ab") as log:
                daemons.append(
                    subprocess.Popen(command, env=here.environment, stdout=log, stderr=log)
                )
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists, 90, "munged does not start")
        try:
            wait_for(lambda: _idle(here), 90, "it is not idle")
        except TimeoutError as error:
            raise TimeoutError(f"Slurm does not start:\n{here.logs()}") from error
        yield here
    finally:
        if len(daemons) == len(DAEMONS):
            subprocess.run(["scancel", "--user=root"], env=here.environment, capture_output=True)
            time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _daemons(here: Here, cores: int, memory_mb: int) -> list[list[str]]:
    folder = here.folder
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=socket.gethostname(),
            folder=folder,
            controller_port=free_port(),
            node_port=free_port(),
            cores=cores,
            memory_mb=memory_mb,
        )
    )
    names = {"key": key, "log": "munged.log", "pid": "munged.pid", "seed": "munged.seed"}
    files = [f"--{kind}-file={folder / name}" for kind, name in names.items()]
    return [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    ]


def _idle(here: Here) -> bool:
    try:
        return "idle" in here.ask("sinfo", "-h", "-o", "%T")
    except RuntimeError:
        return False
