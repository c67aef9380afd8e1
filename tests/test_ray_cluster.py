"""A cluster that loses machines: a head and workers as processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drill_cluster import drill, locally, tars

JOB = ["--samples", "160", "--pause", "0.3"]  # 40 shards of two groups


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
