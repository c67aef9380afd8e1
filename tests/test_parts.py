"""Parts of a job: together they are the whole, side by side they tear nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_specs.cluster.needs import (
    Part,
    Stage,
    parse_address,
    parse_part,
    parse_stage,
    require_everywhere,
)
from pipeline.__main__ import main
from pipeline.dataset import shards
from pipeline.engine import ray_cluster, run
from pipeline.engine.base import Outcome
from pipeline.render.row import Row
from tests.drills.drill_cluster import begin, groups_rendered, locally, tars
from tests.drills.drill_job import TWICE, StubWorker, stub_job

SAMPLES = 42  # ten shards of four and one of two


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 40))
def test_parts_leave_out_no_shard_and_share_none(shards: int, count: int) -> None:
    parts = [Part(index, count).own(range(shards)) for index in range(1, count + 1)]
    assert sorted(shard for part in parts for shard in part) == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 9))
def test_a_larger_dataset_moves_no_shard_to_another_part(few: int, more: int, count: int) -> None:
    for index in range(1, count + 1):
        part = Part(index, count)
        assert part.own(range(few)) == [k for k in part.own(range(few + more)) if k < few]


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1.0/2"])
def test_a_wrong_part_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--part"):
        parse_part(text)
    assert parse_part("3/16") == Part(3, 16) and str(Part(3, 16)) == "3/16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cores", "must be NAME=NUMBER"),
        ("core=2", "did you mean 'cores'"),
        ("cores=two", "cores: .*number"),
        ("memory_gb=-1", "memory_gb"),
        ("gpus=1.5", "whole number"),
    ],
)
def test_wrong_needs_name_the_flag_and_the_field(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"--worker-needs.*{said}"):
        parse_stage(text, "--worker-needs")


@settings(deadline=None)
@given(st.floats(0, 64), st.floats(0, 500), st.sampled_from([None, 0.25, 0.5, 1.0, 4.0]))
def test_needs_survive_the_command_line(cores: float, memory_gb: float, gpus: float | None) -> None:
    stage = Stage(cores=round(cores, 3), memory_gb=round(memory_gb, 2), gpus=gpus)
    assert parse_stage(stage.flag(), "--worker-needs") == stage


def test_what_is_not_said_of_a_stage_fits() -> None:
    assert parse_stage("", "--worker-needs") == Stage()
    assert Stage().options(0.25) == {"num_cpus": 1.0, "num_gpus": 0.25}
    assert Stage(cores=2, memory_gb=1.5, gpus=0).options(0.25) == {
        "num_cpus": 2.0,
        "num_gpus": 0.0,
        "memory": 1_500_000_000,
    }


def test_addresses_of_clusters() -> None:
    assert [parse_address(a) for a in ("", "auto", "head:6379")] == ["", "auto", "head:6379"]
    for wrong in ("head", "ray://head:10001", "http://head:8265", "head:port"):
        with pytest.raises(ValueError, match="--ray-address"):
            parse_address(wrong)


def head(monkeypatch: pytest.MonkeyPatch, late: int, said: str) -> Mock:
    """Stands in for ``ray.init``: a head that gets its first machine after ``late`` tries."""
    refused = ConnectionError("Failed to connect")
    refused.__cause__ = RuntimeError(said)
    init = Mock(side_effect=[*[refused] * late, None])
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: init.call_count > late)
    return init


STARTING = "No node info found matching attributes: '' when trying to resolve node"


def test_a_driver_waits_for_a_head_that_is_only_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    init = head(monkeypatch, 2, STARTING)
    ray_cluster.start_ray(1, "head:6379")
    assert init.call_count == 3


@pytest.mark.parametrize(("said", "patience_s"), [("nobody there", 60.0), (STARTING, -1.0)])
def test_but_not_for_one_that_does_not_answer_nor_for_ever(
    said: str, patience_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "HEAD_S", patience_s)
    init = head(monkeypatch, 9, said)
    with pytest.raises(ValueError, match="--ray-address head:6379: no Ray cluster answers"):
        ray_cluster.start_ray(1, "head:6379")
    assert init.call_count == 1


def test_a_place_that_is_another_on_each_machine_is_refused() -> None:
    require_everywhere([("--out", "/data/out"), ("--out", "s3://bucket/out"), ("--out", "s3:/b/o")])
    with pytest.raises(ValueError, match="--out runs/out: on a cluster it must be absolute"):
        require_everywhere([("--out", "runs/out")])


def test_the_flags_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["shards", "demo", "--samples", "4", "--out", "runs/nowhere"]
    for more, said in (
        (["--part", "3/2"], "--part 3/2"),
        (["--engine", "local", "--ray-address", "auto"], "--ray-address needs --engine ray"),
        (["--ray-address", "auto"], "--out runs/nowhere: on a cluster"),
        (["--worker-needs", "cpus=1"], "--worker-needs"),
        (["--and", "tset=3:runs/test"], "--and tset=3:runs/test: write SPLIT=N:DIR"),
        (["--and", "test=runs/test"], "--and test=runs/test: write SPLIT=N:DIR"),
    ):
        assert main([*job, *more]) == 2
        assert said in capsys.readouterr().err


def test_parts_side_by_side_make_the_dataset_and_the_last_one_its_card(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    job = ("--samples", SAMPLES, "--log", log, "--pause", 0.05)
    parts = [begin(out, *job, "--part", f"{index}/3") for index in (1, 2, 3)]
    told = [part.communicate(timeout=250)[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0, 0]
    assert tars(out) == locally(tmp_path, ["--samples", str(SAMPLES)])
    for name in ("README.md", "dataset.json"):
        assert (out / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert sum("still to be made" in text for text in told) < 3
    lines = groups_rendered(log)
    assert len(lines) == 21 and not [line for line in lines if TWICE in line]


def make(out: Path, part: Part, factory: Any = None) -> Outcome:
    from functools import partial

    maker = factory or partial(StubWorker, log=Path("/dev/null"), pause_s=0)
    return run.run(
        stub_job(out, SAMPLES), "local", 1, progress=False, factory=maker, part=str(part)
    )


def test_another_number_of_parts_makes_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path, Part(1, 2)).made == [0, 2, 4, 6, 8, 10]
    assert main(["finish", str(tmp_path), "--parts", "2"]) == 1
    told = capsys.readouterr().out
    assert "5 of 11 shards are not whole: shard-000001" in told
    assert "run these parts of 2 again: 2" in told
    assert not (tmp_path / "README.md").exists()
    outcome = make(tmp_path, Part(2, 3))
    assert (outcome.made, outcome.skipped) == ([1, 7], 2)
    again = make(tmp_path, Part(2, 3))
    assert (again.made, again.skipped) == ([], 4)
    for index in (1, 3):
        make(tmp_path, Part(index, 3))
    assert main(["finish", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").is_file()


def test_a_shard_that_another_made_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    class Overtaken(StubWorker):
        def make(self, rows: range) -> list[Row]:
            if rows.start == 0:  # while the first shard is made, another job makes the second
                shards.commit(self.job.out, 1, self._second(), self.job.dataset_hash, 0.0)
            return super().make(rows)

        def _second(self) -> list[Row]:
            return [row for g in self.groups(1) for row in super(Overtaken, self).make(g)]

    def factory(job: Any, teacher: Any) -> Overtaken:
        return Overtaken(job, teacher, log=Path("/dev/null"), pause_s=0)

    outcome = make(tmp_path, Part(), factory)
    assert 1 not in outcome.made and outcome.skipped == 1
    assert len(outcome.made) == 10
