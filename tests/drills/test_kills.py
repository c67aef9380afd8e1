"""A hundred kills over many short jobs: workers, teachers, writers in the middle of a commit, and
drivers, chosen by a seeded draw. ``KILLS`` says how many (``make nightly``: 100)."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.dataset.shards import verify_shard
from tests.drills.drill_cluster import (
    Cluster,
    cluster,
    groups_rendered,
    kill_all,
    locally,
    tars,
    titled,
    tree,
)
from tests.drills.drill_job import TWICE, stub_job

KILLS = int(os.environ.get("KILLS", "100"))
A_JOB = 5  # kills, at most
SAMPLES = 64  # 16 shards
JOB = ["--samples", str(SAMPLES), "--pause", "0.15"]


class Kills:
    """Draws who dies next, and kills it, until a job has had enough."""

    def __init__(self, machines: Cluster, seed: int) -> None:
        self.machines, self.draw = machines, random.Random(seed)
        self.done: dict[str, int] = dict.fromkeys(("worker", "teacher", "writer", "driver"), 0)

    def job(self, out: Path, log: Path, most: int) -> None:
        """Run a job to its end, submitting it again whenever it ends badly."""
        arguments = [*JOB, "--out", str(out), "--log", str(log), "--workers", "2"]
        arguments += ["--teacher-actors", "1"]
        for _ in range(3 + most):
            driver = self.machines.driver(arguments)
            most -= self._disturb(driver, out, most)
            if driver.wait(timeout=240) == 0:
                return
        raise AssertionError("the job does not end well, however often it is submitted")

    def _disturb(self, driver: subprocess.Popen[bytes], out: Path, most: int) -> int:
        kills = 0
        while kills < most and driver.poll() is None:
            time.sleep(self.draw.uniform(0.2, 1.5))
            kind = self.draw.choice(sorted(self.done))
            begun = kills < A_JOB // 2 or list(out.glob("shard-*.json"))
            victims = self._victims(kind, driver, out) if begun else []
            if victims:  # not all of them while it starts: no driver would ever be killed
                kill_all([self.draw.choice(victims)] if kind != "driver" else victims)
                self.done[kind] += 1
                kills += 1
        return kills

    def _victims(
        self, kind: str, driver: subprocess.Popen[bytes], out: Path
    ) -> list[psutil.Process]:
        if kind == "driver":  # not before it made something, or no job would ever get anywhere
            return tree(driver.pid) if list(out.glob("shard-*.json")) else []
        everyone = self.machines.processes()
        if kind == "writer":
            return _writing(everyone, out)
        return titled(everyone, "ray::make_task" if kind == "worker" else "ray::TeacherActor")


def _writing(everyone: list[psutil.Process], out: Path) -> list[psutil.Process]:
    """Who has a half-written file in a dataset: looked for during a second."""
    ours, until = {process.pid: process for process in everyone}, time.monotonic() + 1
    while time.monotonic() < until:
        for path in out.glob(".shard-*.tmp"):
            process = ours.get(int(path.name.split(".")[-3]))
            if process is not None:
                return [process]
    return []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_lose_nothing_and_tear_nothing(tmp_path: Path) -> None:
    reference = locally(tmp_path, JOB)
    with cluster(tmp_path, [4]) as machines:
        kills = Kills(machines, seed=8)
        number = 0
        while (done := sum(kills.done.values())) < KILLS:
            out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
            kills.job(out, log, min(A_JOB, KILLS - done))
            check(out, log, reference)
            number += 1
    print(f"{kills.done} over {number} jobs")
    assert sum(kills.done.values()) == KILLS
    assert KILLS < 20 or all(kills.done.values())


def check(out: Path, log: Path, reference: dict[str, bytes]) -> None:
    assert tars(out) == reference
    job = stub_job(out, SAMPLES)
    assert job.todo() == []
    for shard in range(job.shard_count):
        rows = job.shard_range(shard)
        # A stub's records are no sample records; all else of a shard is verified.
        found = verify_shard(out, shard, job.dataset_hash, rows)
        assert all(".json: " in line for line in found), found
    assert (out / "README.md").is_file()
    assert not [line for line in groups_rendered(log) if TWICE in line]
