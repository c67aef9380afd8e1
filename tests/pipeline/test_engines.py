"""One job, every engine, the same bytes; and nothing lost when processes are killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import yaml

from data_specs.recipe import Recipe
from pipeline.__main__ import main
from pipeline.dataset.description import WrongDataset
from pipeline.dataset.job import Job, Worker
from pipeline.dataset.prepare import prepare
from pipeline.dataset.shards import find_shards, read_record, verify_shard
from pipeline.engine import ray_cluster
from pipeline.render.label import Row
from tests import engines
from tests.conftest import ROOT, small_recipe, talk, write
from tests.drills.drill_cluster import contents, kill_all, tars, wait_for, whole

SAMPLES = 18  # four shards of four and one of two
SHARDS = [0, 1, 2, 3, 4]
LONG = 34  # long enough to be killed midway
Corpora = dict[str, list[Path]]


def recipe(**changes: object) -> Recipe:
    small: dict[str, object] = {"shard_samples": 4, "group_samples": 2}
    return small_recipe(**small | changes)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray as the engine itself starts it, once for all tests; a run uses what is there."""
    ray_cluster.start_ray(2)
    yield
    ray.shutdown()


def make(corpora: Corpora, out: Path, engine: str, workers: int, samples: int = SAMPLES) -> Job:
    job = prepare(recipe(), corpora, out, samples)
    outcome = engines.run(job, engine, workers)
    assert outcome.failed == {}
    return job


@pytest.fixture(scope="module")
def reference(corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make(corpora, tmp_path_factory.mktemp("reference"), "local", 1)


@pytest.fixture(scope="module")
def long_reference(corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make(corpora, tmp_path_factory.mktemp("long"), "local", 1, LONG)


def test_the_local_engine_makes_whole_shards(reference: Job) -> None:
    assert find_shards(reference.out) == SHARDS
    for shard in SHARDS:
        rows = reference.shard_range(shard)
        found = verify_shard(reference.out, shard, reference.dataset_hash, rows, deep=True)
        assert found == []
    assert reference.todo() == []


@pytest.mark.parametrize(
    ("engine", "workers"),
    [("local", 2), pytest.param("ray", 1, marks=pytest.mark.slow), ("ray", 2)],
)
def test_every_engine_makes_the_same_bytes(
    engine: str, workers: int, reference: Job, corpora: Corpora, tmp_path: Path
) -> None:
    make(corpora, tmp_path, engine, workers)
    assert tars(tmp_path) == tars(reference.out)
    # Were Ray's writes to wait for a core that its workers hold, all would come at the end.
    times = [path.stat().st_mtime for path in sorted(tmp_path.glob("shard-*.json"))]
    assert len(times) == len(SHARDS) and max(times) - min(times) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_several_splits_in_one_run_are_those_of_their_own_commands(
    engine: str, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = count_loads(monkeypatch)
    options = [f"--corpus={name}={folders[0]}" for name, folders in corpora.items()]
    command = ["shards", str(recipe_file(tmp_path, recipe())), *options]
    alone, together = tmp_path / "alone", tmp_path / "together"
    for split, samples in (("train", "6"), ("validation", "5")):
        more = ["--split", split, "--samples", samples, "--out", str(alone / split)]
        assert main([*command, *more, "--engine", "local", "--workers", "1"]) == 0
    assert loads == [0, 0]
    both = ["--samples", "6", "--out", str(together / "train")]
    both += ["--and", f"validation=5:{together / 'validation'}", "--engine", engine]
    assert main([*command, *both, "--workers", "1"]) == 0
    assert len(loads) == (3 if engine == "local" else 2)  # Ray's worker is another process
    assert contents(together) == contents(alone) and len(contents(alone)) > 8


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes every load of a teacher in this process."""
    loads, load = list[int](), Job.load_teacher
    monkeypatch.setattr(Job, "load_teacher", lambda job: (loads.append(0), load(job))[1])
    return loads


def test_running_again_makes_nothing_again(reference: Job, corpora: Corpora) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.out.glob("shard-*")}
    outcome = engines.run(reference, "local", 1)
    assert (outcome.made, outcome.skipped) == ([], 5)
    assert before == {path: path.stat().st_mtime_ns for path in reference.out.glob("shard-*")}


def test_words_and_limits_are_not_the_data(reference: Job, corpora: Corpora) -> None:
    again = recipe(about="other words", max_dropped_share=0.5)
    assert prepare(again, corpora, reference.out, SAMPLES).todo() == []


def test_more_samples_extend_a_dataset(reference: Job, corpora: Corpora, tmp_path: Path) -> None:
    job = prepare(recipe(), corpora, tmp_path, 8)
    engines.run(job, "local", 1)
    more = prepare(recipe(), corpora, tmp_path, SAMPLES)
    assert more.todo() == [2, 3, 4]
    engines.run(more, "local", 1)
    assert tars(tmp_path) == tars(reference.out)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 4}, "recipe.seed: 3 there, 4 asked for"),
        ({"teacher": {"name": "dnsmos", "precision": "fp32"}}, "recipe.teacher.name"),
    ],
)
def test_another_recipe_is_refused(
    changes: dict, said: str, reference: Job, corpora: Corpora
) -> None:
    with pytest.raises(WrongDataset, match=said.replace(".", r"\.")):
        prepare(recipe(**changes), corpora, reference.out, SAMPLES)


def test_other_recordings_are_refused(reference: Job, corpora: Corpora, tmp_path: Path) -> None:
    fewer = tmp_path / "noise"
    fewer.mkdir()
    for path in sorted(corpora["noise"][0].iterdir())[:4]:
        (fewer / path.name).write_bytes(path.read_bytes())
    with pytest.raises(WrongDataset, match=r"corpora\.noise"):
        prepare(recipe(), corpora | {"noise": [fewer]}, reference.out, SAMPLES)


def start(corpora: Corpora, out: Path, recipe: Path, engine: str) -> subprocess.Popen[bytes]:
    options = [f"--corpus={name}={folders[0]}" for name, folders in corpora.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "shards", recipe, *options, "--out", out]
        + ["--samples", str(LONG), "--engine", engine, "--workers", "2"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def recipe_file(folder: Path, recipe: Recipe) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return path


def kill(process: subprocess.Popen[bytes], engine: str) -> None:
    """SIGKILL one worker and then the driver; then take down what Ray leaves running."""
    children = psutil.Process(process.pid).children(recursive=True)
    worker = "ray::" if engine == "ray" else "spawn_main"
    for child in children:
        if worker in " ".join(child.cmdline()):
            child.kill()
            psutil.wait_procs([child], timeout=20)
            break
    else:
        raise AssertionError(f"no {engine} worker to kill")
    process.kill()
    process.wait()
    if engine == "local":
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive  # workers end with a killed driver
    kill_all(children)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "local"])
def test_killed_driver_and_worker_then_the_same_command(
    engine: str, long_reference: Job, corpora: Corpora, tmp_path: Path
) -> None:
    out, path = tmp_path / "out", recipe_file(tmp_path, recipe())
    out.mkdir()
    process = start(corpora, out, path, engine)
    wait_for(lambda: whole(out), 240, "no shard was made")  # machines are shared
    kill(process, engine)
    committed = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    done = {int(path.stem.removeprefix("shard-")) for path in committed}
    assert start(corpora, out, path, engine).wait() == 0
    assert tars(out) == tars(long_reference.out)
    assert 0 < len(done) < 9
    assert committed == {path: path.stat().st_mtime_ns for path in committed}  # none made twice


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_shard_over_its_failure_limit_fails_alone(
    engine: str, corpora: Corpora, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = prepare(recipe(max_dropped_share=0.0), corpora | quiet(tmp_path), out, SAMPLES)
    outcome = engines.run(job, engine, 1)
    assert outcome.failed and all("silent" in text for text in outcome.failed.values())
    assert set(outcome.failed) | set(outcome.made) == set(SHARDS)
    assert find_shards(out) == sorted(outcome.made)


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_fails_and_the_others_are_made(
    corpora: Corpora, tmp_path: Path
) -> None:
    class Deadly(Worker):  # here, so that it travels to Ray's workers whole
        def make(self, rows: range) -> list[Row]:
            if rows.start // self.job.recipe.shard_samples == 1:
                os._exit(1)
            return super().make(rows)

    job = prepare(recipe(), corpora, tmp_path, 12)
    outcome = engines.run(job, "ray", 1, factory=Deadly)
    assert outcome.made == [0, 2]
    assert outcome.failed == {1: "its worker died 4 times (killed, or out of memory)"}


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_recording_that_vanishes_fails_the_attempt_by_name(
    engine: str, corpora: Corpora, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(corpora["speech"][0], tmp_path / "speech"))
    job = prepare(recipe(), corpora | {"speech": [copy]}, tmp_path / "out", SAMPLES)
    shutil.rmtree(copy)
    failed = engines.run(job, engine, 1).failed
    assert sorted(failed) == SHARDS
    assert all(str(copy) in reason for reason in failed.values())
    assert find_shards(job.out) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_full_disk_stops_the_run_and_a_larger_one_goes_on(
    engine: str, corpora: Corpora, reference: Job, tmp_path: Path
) -> None:
    ray.shutdown()  # a run that starts Ray itself leaves no writer behind
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        job = prepare(recipe(), corpora, disk / "out", SAMPLES)
        with pytest.raises(OSError, match="No space left"):
            engines.run(job, engine, 1)
        for shard in find_shards(job.out):
            rows = job.shard_range(shard)
            assert verify_shard(job.out, shard, job.dataset_hash, rows) == []
        assert len(find_shards(job.out)) < len(SHARDS)
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        again = prepare(recipe(), corpora, job.out, SAMPLES)
        assert not list(disk.rglob("*.tmp"))  # left where Ray ended another write midway
        assert engines.run(again, engine, 1).failed == {}
        assert tars(job.out) == tars(reference.out)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def quiet(folder: Path) -> Corpora:
    """Noise of which a third is silent."""
    for i in range(9):
        write(folder / "noise" / f"{i}.wav", talk(3, i) * (0 if i % 3 == 0 else 1))
    return {"noise": [folder / "noise"]}


def test_every_record_says_what_was_dropped(corpora: Corpora, tmp_path: Path) -> None:
    job = prepare(
        recipe(max_dropped_share=1.0), corpora | quiet(tmp_path), tmp_path / "out", SAMPLES
    )
    engines.run(job, "local", 1)
    records = [read_record(job.out, shard) for shard in SHARDS]
    dropped = [drop for record in records if record for drop in record.dropped]
    assert dropped
    assert {drop["reason"] for drop in dropped} == {"silent"}
    assert all("/noise/" in d["detail"] or ".wav" in d["detail"] for d in dropped)
    assert sum(r.samples for r in records if r) + len(dropped) == SAMPLES
