"""Workers that share teachers make the same bytes, and lose nothing when a teacher is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_specs.recipe import Teacher as TeacherSpec
from data_specs.sample import CROP_SAMPLES
from pipeline.dataset.job import Job
from pipeline.dataset.prepare import prepare
from pipeline.dataset.shards import ShardError, find_shards
from pipeline.engine import ray_cluster, teachers
from pipeline.engine.base import EngineOptions
from pipeline.engine.local import torch_threads_kept
from pipeline.engine.relabel import Relabeller
from pipeline.engine.relabel import prepare as prepare_again
from tests import engines
from tests.conftest import small_recipe
from tests.drills.drill_cluster import kill_all, tars, titled, wait_for, whole
from tests.pipeline.conftest import Says

SAMPLES = 26  # six shards of four and one of two: long enough for a teacher to be killed midway
Corpora = dict[str, list[Path]]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray as the engine itself starts it for two workers and a teacher, once for all tests."""
    import ray

    ray_cluster.start_ray(3)
    yield
    ray.shutdown()


def job_in(corpora: Corpora, out: Path, samples: int = SAMPLES) -> Job:
    recipe = small_recipe(shard_samples=4, group_samples=2)
    return prepare(recipe, corpora, out, samples)


@pytest.fixture(scope="module")
def prepared(corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job_in(corpora, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def reference(prepared: Job) -> Job:
    assert engines.run(prepared, "local", 1).failed == {}
    return prepared


@pytest.mark.slow
def test_workers_that_share_a_teacher_make_the_same_bytes(
    reference: Job, corpora: Corpora, tmp_path: Path
) -> None:
    job = job_in(corpora, tmp_path, 8)
    outcome = engines.run(job, "ray", 2, teacher_actors=1)
    assert outcome.failed == {} and find_shards(tmp_path) == [0, 1]
    assert tars(tmp_path) == {name: tars(reference.out)[name] for name in tars(tmp_path)}


def teacher_processes() -> list[psutil.Process]:
    """The processes of teacher actors."""
    return titled(psutil.Process().children(recursive=True), "TeacherActor")


@pytest.fixture(autouse=True)
def none_outlives_its_run(cluster: None) -> Iterator[None]:
    yield
    _, alive = psutil.wait_procs(teacher_processes(), timeout=20)
    assert alive == []


@contextmanager
def one_killed(out: Path) -> Iterator[None]:
    """Meanwhile the teacher is killed with SIGKILL, once the first shard is whole."""

    def kill() -> int:
        wait_for(lambda: whole(out) and teacher_processes(), 120, "no teacher, or no shard")
        found = teacher_processes()
        kill_all(found)
        return len(found)

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        yield
        assert killed.result() == 1


@pytest.mark.slow
def test_a_killed_teacher_is_started_again_and_nothing_is_lost(
    reference: Job, corpora: Corpora, tmp_path: Path
) -> None:
    job = job_in(corpora, tmp_path)
    with one_killed(tmp_path):
        outcome = engines.run(job, "ray", 2, teacher_actors=1)
    assert outcome.failed == {} and len(outcome.made) == 7
    assert tars(tmp_path) == tars(reference.out)


@pytest.mark.slow
def test_a_teacher_that_dies_for_good_fails_its_shards_by_name(
    reference: Job, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "RESTARTS", 0)
    job = job_in(corpora, tmp_path)
    with one_killed(tmp_path):
        outcome = engines.run(job, "ray", 2, teacher_actors=1)
    assert outcome.made and outcome.failed
    assert sorted([*outcome.made, *outcome.failed]) == list(range(7))
    assert all("'mfcc': its actor died" in reason for reason in outcome.failed.values())
    monkeypatch.undo()  # and the same command again makes the rest
    again = engines.run(job, "ray", 2, teacher_actors=1)
    assert sorted(again.made) == sorted(outcome.failed)
    assert tars(tmp_path) == tars(reference.out)


@pytest.mark.slow
def test_two_teachers_label_a_dataset_again(
    reference: Job, corpora: Corpora, tmp_path: Path
) -> None:
    source = replace(reference, samples=8)
    job = prepare_again(source, tmp_path / "out", TeacherSpec(name="mfcc"))
    factory = partial(Relabeller, source=source)
    outcome = engines.run(job, "ray", 1, factory=factory, teacher_actors=2)
    assert outcome.failed == {}
    assert find_shards(job.out) == [0, 1]
    assert tars(job.out) == {name: tars(reference.out)[name] for name in tars(job.out)}


@pytest.mark.slow
def test_a_teachers_own_error_comes_back_as_it_is(reference: Job) -> None:
    with teachers.shared_teacher(reference, EngineOptions(teacher_actors=1)) as (teacher, _):
        assert teacher is not None
        assert teacher.name == "mfcc"
        assert teacher.weights_sha256 == reference.identity["teacher_sha256"]
        with pytest.raises(
            ValueError, match=rf"^waves of shape \(2, 5\): need \(B, {CROP_SAMPLES}"
        ):
            teacher.score(np.zeros((2, 5), np.float32))
        mos_B, logit_B = teacher.score(np.zeros((1, CROP_SAMPLES), np.float32))
        assert mos_B.shape == (1,) and logit_B is not None and logit_B.shape == (1,)


class CountingTeacher:
    """Notes how many calls were inside at once; with a ``barrier`` each waits for another one."""

    name, weights_sha256 = "counting", "d" * 64

    def __init__(self, barrier: threading.Barrier | None) -> None:
        self.barrier, self.counting = barrier, threading.Lock()
        self.inside = self.most = 0

    def score(self, waves_BT: np.ndarray) -> tuple[np.ndarray, None]:
        with self.counting:
            self.inside += 1
            self.most = max(self.most, self.inside)
        if self.barrier:
            self.barrier.wait(60)
        with self.counting:
            self.inside -= 1
        return waves_BT[:, 0], None


@pytest.mark.parametrize(("device", "most"), [("cpu", 1), ("cuda", 2)])
def test_a_gpus_next_group_comes_in_while_one_is_scored(
    device: str, most: int, prepared: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = CountingTeacher(threading.Barrier(2) if most == 2 else None)
    monkeypatch.setattr(Job, "load_teacher", lambda _: teacher)
    actor = teachers.TeacherActor(replace(prepared, teacher_device=device))
    groups = [np.full((2, 4), pcm, np.int16) for pcm in (-32768, 1, 32767, 5)]
    with torch_threads_kept(), ThreadPoolExecutor(2) as pool:  # as Ray runs two of its calls
        scores = [mos_B.tolist() for mos_B, _ in pool.map(actor.score, groups)]
    assert scores == [[pcm / 32768] * 2 for pcm in (-32768, 1, 32767, 5)]
    assert teacher.most == most


def test_a_teacher_that_cannot_be_loaded_ends_the_run_in_its_own_words(prepared: Job) -> None:
    other = replace(prepared, identity=prepared.identity | {"teacher_sha256": "f" * 64})
    with (
        pytest.raises(ShardError, match="'mfcc' has other weights on this machine"),
        teachers.shared_teacher(other, EngineOptions(teacher_actors=1)),
    ):
        pass


@pytest.mark.parametrize(
    ("asked", "device", "said"),
    [
        ({"teacher_actors": 3}, "cpu", "needs 4 CPUs and this Ray has 3"),
        (
            {"teacher_actors": 3, "teachers_per_gpu": 2},
            "cuda",
            "needs 2 GPUs and this Ray has 0: .*per-gpu",
        ),
    ],
)
def test_more_teachers_than_there_is_room_for_are_refused(
    asked: dict[str, int], device: str, said: str, corpora: Corpora, tmp_path: Path
) -> None:
    import ray

    if device == "cuda" and ray.cluster_resources().get("GPU"):
        pytest.skip("there is a GPU")
    job = replace(job_in(corpora, tmp_path), teacher_device=device)
    with pytest.raises(ValueError, match=said):
        engines.run(job, "ray", 1, **asked)
    assert find_shards(tmp_path) == []


def test_teachers_that_fit_on_no_machine_are_refused(
    corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "ROOM_S", 2.0)
    asked = {"teacher_actors": 1, "teacher_needs": "cores=1,memory_gb=100000"}
    with pytest.raises(ValueError, match=r"each needs .*'memory': 1000.* on one machine"):
        engines.run(job_in(corpora, tmp_path), "ray", 1, **asked)
    assert find_shards(tmp_path) == []


@pytest.mark.slow
def test_an_autoscaler_sees_what_all_workers_take_that_have_no_place(
    corpora: Corpora, tmp_path: Path
) -> None:
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    pending: list[int] = []
    stop = threading.Event()

    def look() -> None:
        address = ray.get_runtime_context().gcs_address
        while not stop.wait(0.2):
            demand = get_cluster_status(address).resource_demands.ray_task_actor_demand
            pending.append(sum(b.count for one in demand for b in one.bundles_by_count))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    job = job_in(corpora, tmp_path, 20)  # five shards
    assert engines.run(job, "ray", 7, teacher_actors=1).failed == {}
    stop.set()
    thread.join()
    assert max(pending) == 3  # of five workers, beside the teacher two had a core


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "local", "--teacher-actors", "1"], "needs --engine ray, not local"),
        (["--teacher-actors", "-1"], "at least 0"),
        (["--teacher-actors", "1", "--teachers-per-gpu", "0"], "at least 1"),
        (["--teacher-actors", "1", "--teacher-device", "cuda:1"], "write cuda"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_read(
    options: list[str], said: str, tmp_path: Path, says: Says
) -> None:
    out = tmp_path / "out"
    assert said in says(2, "shards", "demo", "--samples", "4", "--out", out, *options)
    assert not out.exists()
