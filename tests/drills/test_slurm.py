"""The rendered files on a real Slurm of one node."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_specs.cluster.site import Site
from pipeline.cluster import submit as shards_submit
from pipeline.dataset.prepare import prepare
from tests import engines
from tests.conftest import ROOT, small_recipe
from tests.drills.drill_cluster import tars, wait_for, whole
from tests.drills.slurm_here import Here, missing, slurm
from tests.train_helpers import write_dataset
from train import submit as train_submit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SAMPLES = 26  # six shards of four and one of two
LONG_S = 500
Corpora = dict[str, list[Path]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    if lacking := missing():
        pytest.skip(lacking)
    with slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def site(here: Here, parts: int = 3) -> Site:
    size = {"cores": 1, "memory_gb": 4}
    return Site.model_validate(
        {
            "name": "small",
            "project": str(ROOT),
            "python": sys.executable,
            "setup": [f"export PATH={Path(sys.executable).parent}:$PATH"],
            "environment": {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "RAY_worker_niceness": "0",  # else its workers starve beside others' work
            },
            "worker": {"cores": 1, "memory_gb": 2},
            "slurm": {
                **size,
                "cores": 2,
                "partition": "here",
                "time": "0:30:00",
                "logs": str(here.folder),
                "array": {**size, "parts": parts, "at_once": 2},
            },
            "training": {**size, "cores": 2, "processes": 2},
        }
    )


def recipe() -> dict:
    return small_recipe(shard_samples=4, group_samples=2).model_dump(mode="json", exclude_none=True)


@pytest.fixture(scope="module")
def reference(corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    small = small_recipe(shard_samples=4, group_samples=2)
    job = prepare(small, corpora, tmp_path_factory.mktemp("reference"), SAMPLES)
    assert engines.run(job, "local", 1).failed == {}
    return tars(job.out)


def job(corpora: Corpora, folder: Path) -> list[str]:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    places = [f"--corpus={name}={folders[0]}" for name, folders in corpora.items()]
    return [str(path), *places, "--out", str(folder / "out"), "--samples", str(SAMPLES)]


TRAIN = ["--student", "v1", "--steps", "4", "--batch", "4", "--workers", "0"]


def test_sbatch_accepts_every_file(here: Here, corpora: Corpora, tmp_path: Path) -> None:
    shards, at = job(corpora, tmp_path), site(here)
    train = [*TRAIN, "--shards", "/data/shards", "--out", "/data/run"]
    for made in (
        shards_submit.submission("slurm", at, shards),
        shards_submit.submission("slurm-array", at, shards),
        train_submit.submission("slurm", at, train),
    ):
        assert "to start at" in here.ask("sbatch", "--test-only", text=made.file)
    wrong = made.file.replace("--partition=here", "--partition=nowhere")
    with pytest.raises(RuntimeError, match="invalid partition"):
        here.ask("sbatch", "--test-only", text=wrong)


def test_the_script_makes_the_same_dataset(
    here: Here, reference: dict[str, bytes], corpora: Corpora, tmp_path: Path
) -> None:
    made = shards_submit.submission("slurm", site(here), job(corpora, tmp_path))
    number = here.submit(made.file)
    here.wait(number, LONG_S, "COMPLETED")
    assert tars(tmp_path / "out") == reference
    assert (tmp_path / "out" / "README.md").is_file()
    assert not Path(f"/tmp/ray-{number}").exists()


def test_a_warning_queues_the_script_again_and_it_goes_on(
    here: Here, reference: dict[str, bytes], corpora: Corpora, tmp_path: Path
) -> None:
    made = shards_submit.submission("slurm", site(here), job(corpora, tmp_path))
    number = here.submit(made.file)
    out = tmp_path / "out"
    wait_for(lambda: whole(out) >= 1, LONG_S, "no shard was made")
    here.ask("scancel", "--batch", "--signal=USR1", number)  # as Slurm does before the time is up
    here.wait(number, 60, "PENDING", "REQUEUED", "CONFIGURING")
    made_before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert 0 < len(made_before) < len(reference)
    here.wait(number, LONG_S, "COMPLETED")
    assert tars(out) == reference
    assert made_before == {path: path.stat().st_mtime_ns for path in made_before}


def test_the_array_makes_the_same_dataset_though_a_task_is_cancelled_and_queued_again(
    here: Here, reference: dict[str, bytes], corpora: Corpora, tmp_path: Path
) -> None:
    made = shards_submit.submission("slurm-array", site(here), job(corpora, tmp_path))
    number, out = here.submit(made.file), tmp_path / "out"
    first = f"{number}_1"
    mine = [out / f"shard-{shard:06d}.json" for shard in (0, 3, 6)]
    wait_for(mine[0].exists, LONG_S, "the first task makes nothing")
    here.ask("scancel", first)
    wait_for(lambda: here.states(number)[first] == "CANCELLED", 60, "the task goes on")
    assert not mine[2].exists()
    before = mine[0].stat().st_mtime_ns
    here.wait(number, LONG_S, "COMPLETED", "CANCELLED")
    assert not (out / "README.md").exists()  # the dataset is not whole
    here.ask("scontrol", "requeue", first)
    here.wait(number, LONG_S, "COMPLETED")
    assert tars(out) == reference
    assert mine[0].stat().st_mtime_ns == before
    assert (out / "README.md").is_file()


def test_a_warning_to_one_task_queues_that_task_alone(
    here: Here, reference: dict[str, bytes], corpora: Corpora, tmp_path: Path
) -> None:
    made = shards_submit.submission("slurm-array", site(here), job(corpora, tmp_path))
    number, out = here.submit(made.file), tmp_path / "out"
    wait_for((out / "shard-000001.json").exists, LONG_S, "the second task makes nothing")
    running = [task for task, state in here.states(number).items() if state == "RUNNING"]
    here.ask("scancel", "--batch", "--signal=USR1", f"{number}_2")
    here.wait(number, LONG_S, "COMPLETED")
    told = here.ask("scontrol", "show", "job", number)
    restarts = dict(re.findall(r"ArrayTaskId=(\d+) .*?Restarts=(\d+)", told, re.DOTALL))
    assert len(running) == 2  # another was at work beside it
    assert restarts == {"1": "0", "2": "1", "3": "0"}
    assert tars(out) == reference


def test_training_runs_by_torchrun(here: Here, tmp_path: Path) -> None:
    shards, out = write_dataset(tmp_path / "shards", validation=4), tmp_path / "run"
    arguments = [*TRAIN, "--shards", str(shards), "--out", str(out)]
    made = train_submit.submission("slurm", site(here), arguments)
    assert "--nproc-per-node=2" in made.file
    here.wait(here.submit(made.file), LONG_S, "COMPLETED")
    assert (out / "last.pt").is_file()
    assert time.time() - (out / "last.pt").stat().st_mtime < LONG_S
