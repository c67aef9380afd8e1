"""A Ray cluster of separate processes, each machine in a network of its own where that is allowed;
and the drill: machines, teacher and head are killed under a job, which must lose nothing.

``python -m tests.drills.drill_cluster --samples 3000 --recipe demo --corpus speech=DIR ...``
does it to a real job; the test does it to a small one.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT
from tests.drills.drill_job import TWICE, hold
from tests.sketches import tars

RAY = Path(sys.executable).with_name("ray")
NODE = ["--disable-usage-stats", "--include-log-monitor=false", "--block"]
STARTED = "Ray runtime started"
SIZE = ["--object-store-memory=100000000"]


def tree(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, as when a machine loses its power.

    Waits until they are dead, and leaves it to their parents to ask how they ended: psutil's own
    waiting would take a child's exit status away, and ``Popen`` then says 0 of it.
    """
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with suppress(TimeoutError):
        wait_for(lambda: all(_dead(process) for process in processes), 20, "some will not die")


def _dead(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def titled(processes: Sequence[psutil.Process], title: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


class Network:
    """Namespaces joined by a bridge, if the kernel and our rights allow it."""

    def __init__(self) -> None:
        self.name = f"d{secrets.token_hex(3)}"  # the kernel takes its time to forget the last one's
        self.subnet = f"10.{77 + os.getpid() % 100}.0"
        self.spaces: list[str] = []
        self.there = self._try("link", "add", self.name, "type", "bridge")
        if self.there:
            self._try("link", "set", self.name, "up")

    @staticmethod
    def _try(*words: str) -> bool:
        if not shutil.which("ip"):
            return False
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    def add(self) -> tuple[list[str], str]:
        """A machine's place in the network: how to run something there, and its address."""
        if not self.there:
            return [], "127.0.0.1"
        number = len(self.spaces) + 1
        space, address = f"{self.name}n{number}", f"{self.subnet}.{number}"
        inside, outside = f"{self.name}i{number}", f"{self.name}o{number}"
        for words in (
            f"netns add {space}",
            f"link add {outside} type veth peer name {inside}",
            f"link set {inside} netns {space}",
            f"link set {outside} master {self.name} up",
            f"-n {space} addr add {address}/24 dev {inside}",
            f"-n {space} link set {inside} up",
            f"-n {space} link set lo up",
        ):
            if not self._try(*words.split()):
                raise RuntimeError(f"ip {words}: refused")
        self.spaces.append(space)
        return ["ip", "netns", "exec", space], address

    def close(self) -> None:
        for space in self.spaces:
            self._try("netns", "del", space)
        if self.there:
            self._try("link", "del", self.name)


class Cluster:
    """Machines that are started and killed one by one."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.folder, self.network = folder, network
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.drivers: list[subprocess.Popen[bytes]] = []
        # The path of a socket must be short, and pytest's folders are not.
        self.temporary = Path("/tmp") / f"rd{os.getpid()}-{secrets.token_hex(2)}"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_health_check_period_ms": "1000",
            "RAY_raylet_start_wait_time_s": "300",  # a busy machine is no broken one
            "RAY_gcs_server_request_timeout_seconds": "300",
            # Ray makes its workers as nice as can be (15): beside others' work they starve.
            "RAY_worker_niceness": "0",
        }
        self.environment.pop("RAY_ADDRESS", None)

    def head(self, cores: int) -> None:
        self.where, host = self.network.add()
        self.address = f"{host}:{free_port()}"
        port = self.address.partition(":")[2]
        self._start("head", self.where, host, cores, "--head", f"--port={port}")
        wait_for(lambda: self._answers(), 120, "the head does not answer")

    def add(self, name: str, cores: int) -> None:
        where, host = self.network.add()
        log = self.folder / f"{name}.log"
        before = len(log.read_text()) if log.exists() else 0
        self._start(name, where, host, cores, f"--address={self.address}")
        # On one host they share a folder, and two that start at once choose the same names in it.
        wait_for(lambda: STARTED in log.read_text()[before:], 300, f"{name} does not start")

    def _start(self, name: str, where: list[str], host: str, cores: int, *more: str) -> None:
        options = [f"--node-ip-address={host}", f"--num-cpus={cores}", *SIZE, *NODE, *more]
        if more[0] == "--head":
            options += [f"--temp-dir={self.temporary}", "--include-dashboard=false"]
            options += [f"--ray-client-server-port={free_port()}"]
        self.nodes[name] = self._logged(name, [*where, str(RAY), "start", *options])

    def _logged(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                command,
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        ask = [*self.where, str(RAY), "health-check", "--address", self.address]
        return not subprocess.run(ask, env=self.environment, capture_output=True).returncode

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Of one machine, or of all."""
        nodes = [self.nodes[name]] if name else list(self.nodes.values())
        return [process for node in nodes for process in tree(node.pid)]

    def runs(self, name: str, title: str) -> bool:
        """Whether a machine has a process of that title."""
        return bool(titled(self.processes(name), title))

    def works(self, name: str) -> bool:
        """Whether a machine has a worker, or a teacher."""
        return any(self.runs(name, f"ray::{kind}") for kind in ("make_task", "TeacherActor"))

    def kill(self, name: str) -> None:
        kill_all(self.processes(name))
        self.nodes.pop(name).wait()

    def driver(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """The job, on the head's machine."""
        job = [sys.executable, "-m", "tests.drills.drill_job", "--engine", "ray", *arguments]
        command = [*self.where, *job, "--ray-address", self.address]
        self.drivers.append(self._logged("driver", command))
        return self.drivers[-1]

    def close(self) -> None:
        """End everything; a driver that a failed step left would go on beside the next test."""
        for driver in self.drivers:
            if driver.poll() is None:
                kill_all(tree(driver.pid))
                driver.wait()
        for name in list(self.nodes):
            self.kill(name)
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def cluster(folder: Path, cores: Sequence[int]) -> Iterator[Cluster]:
    """A head with the first number of cores, and a machine for each of the others."""
    network = Network()
    found = Cluster(folder, network)
    try:
        found.head(cores[0])
        for number, each in enumerate(cores[1:]):
            found.add(f"node{number}", each)
        yield found
    finally:
        found.close()
        network.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(
    check: Callable[[], object],
    seconds: float,
    otherwise: str,
    process: subprocess.Popen[Any] | None = None,
) -> None:
    """``TimeoutError`` where it does not come about in time, or not before a process ends."""
    until = time.monotonic() + seconds
    while not check():
        if time.monotonic() > until or (process and process.poll() is not None):
            raise TimeoutError(otherwise)
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of datasets but those of the runs themselves (``attempts``)."""
    paths = [
        path for path in folder.rglob("*") if path.is_file() and path.parent.name != "attempts"
    ]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def whole(out: Path) -> int:
    return len(list(out.glob("shard-*.json")))


def groups_rendered(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def begin(out: Path, *options: object) -> subprocess.Popen[str]:
    """The job without Ray, unless the options say so; what it says comes through a pipe."""
    how = ["--engine", "local", "--workers", "1", "--out", out, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.drills.drill_job", *map(str, how)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def locally(folder: Path, arguments: Sequence[str]) -> dict[str, bytes]:
    """The tars of an undisturbed run without Ray."""
    job = begin(folder / "reference", *arguments, "--pause", "0")
    said, _ = job.communicate()
    assert job.returncode == 0, said
    return tars(folder / "reference")


def drill(folder: Path, arguments: Sequence[str], seconds: float) -> dict[str, int]:
    """Kill a machine, add one, kill the teacher, kill the head and submit again.

    Returns what happened as numbers; raises where a step does not come about in ``seconds``.
    """
    out, log = folder / "out", folder / "renders.log"
    job = [*arguments, "--out", str(out), "--log", str(log), "--teacher-actors", "1"]
    job += ["--workers", "3"]
    happened = {}
    with cluster(folder, [2, 1, 1]) as machines:  # the teacher is on any of them
        driver, works = machines.driver(job), partial(machines.runs, title="ray::make_task")
        wait_for(lambda: whole(out) >= 3, seconds, "no three shards were made")
        nodes = ("node0", "node1")  # the head may have made three before they were there
        with held(log):
            wait_for(lambda: any(works(n) for n in nodes), seconds, "no node works")
        machines.kill(next(name for name in nodes if works(name)))
        before = whole(out)
        wait_for(lambda: whole(out) >= before + 3, seconds, "a lost machine stops the job")
        with held(log):
            machines.add("node2", 1)
            wait_for(lambda: works("node2"), seconds, "the new machine gets no work")
        teachers = titled(machines.processes(), "TeacherActor")
        kill_all(teachers)
        happened["teachers killed"], before = len(teachers), whole(out)
        wait_for(lambda: whole(out) >= before + 3, seconds, "a killed teacher stops the job")
        happened["whole as the head dies"] = whole(out)
        assert driver.poll() is None, "the job ended before its head could be killed"
        machines.kill("head")
        kill_all(tree(driver.pid))  # it was on the head's machine
        driver.wait()
    with cluster(folder, [2, 1]) as machines:
        assert machines.driver(job).wait(timeout=10 * seconds) == 0
    lines = groups_rendered(log)
    happened["groups rendered"] = len(lines)
    happened["twice"] = sum(TWICE in line for line in lines)
    happened["networks"] = int(machines.network.there)
    return happened


@contextmanager
def held(log: Path) -> Iterator[None]:
    """Nothing is made meanwhile: a machine may take longer to start than a job to end."""
    hold(log).touch()
    try:
        yield
    finally:
        hold(log).unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="for each step")
    options, job = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    reference = locally(options.folder, job)
    print(f"without Ray: {len(reference)} shards, {time.monotonic() - began:.0f} s")
    print(drill(options.folder, job, options.seconds))
    same = tars(options.folder / "out") == reference
    print(f"the same bytes: {same}; {time.monotonic() - began:.0f} s")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
