"""A cluster that loses machines: a head and workers as processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills.drill_cluster import cluster, drill, locally, tars, wait_for, whole

JOB = ["--samples", "160", "--pause", "0.3"]  # 40 shards of two groups
LONGER = ["--samples", "320", "--pause", "0.3"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_machines_teacher_and_head_die_and_nothing_is_lost_or_made_twice(tmp_path: Path) -> None:
    reference = locally(tmp_path, JOB)
    happened = drill(tmp_path, JOB, 300)  # a busy machine is no broken one
    assert tars(tmp_path / "out") == reference
    assert len(reference) == 40
    assert happened["twice"] == 0
    assert happened["teachers killed"] >= 1
    assert 9 <= happened["whole as the head dies"] < 40
    # Each group once, but for shards that somebody held as they died: three workers, four times.
    assert 80 <= happened["groups rendered"] <= 80 + 2 * 3 * 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_teacher_comes_back_though_workers_want_its_place(tmp_path: Path) -> None:
    """Its machine dies, and all that are left are full of workers who wait for it."""
    reference = locally(tmp_path, LONGER)
    out = tmp_path / "out"
    job = [*LONGER, "--out", str(out), "--teacher-actors", "1", "--workers", "2"]
    with cluster(tmp_path, [0, 1, 1, 1]) as machines:
        driver, nodes = machines.driver(job), ("node0", "node1", "node2")
        wait_for(lambda: whole(out) >= 3, 300, "no three shards were made")
        wait_for(lambda: all(map(machines.works, nodes)), 60, "a machine is idle")
        machines.kill(next(node for node in nodes if machines.runs(node, "TeacherActor")))
        assert driver.wait(timeout=300) == 0
    assert tars(out) == reference
