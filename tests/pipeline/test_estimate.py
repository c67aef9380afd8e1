"""Time, size and cost of a dataset: multiplied as a reader can check, and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_specs.recipe import load_recipe
from pipeline.cluster import estimate, rates
from pipeline.cluster.rates import Rates, cost_sha256, predict
from pipeline.dataset.plan_file import names_by_index
from tests.bench import scale as bench_scale
from tests.bench.__main__ import main as run_bench
from tests.conftest import small_recipe
from tests.pipeline.conftest import Says


def known(recipe: str = "paper", **changes: Any) -> Rates:
    """Half a second of a core and 100 kB a sample."""
    values: dict[str, Any] = {"recipe": recipe, "recipe_sha256": cost_sha256(load_recipe(recipe))}
    values |= {"start_s": 10.0, "core_s": {"opus": 0.2, "teacher": 0.3}, "sample_bytes": 1e5}
    return Rates(**values | changes)


ON_GPU = {"core_s": {"opus": 0.1}, "gpu_s": {"teacher": 0.01}}


@pytest.mark.parametrize(
    ("changes", "samples", "machines", "seconds", "bottleneck"),
    [
        ({}, 100, {"workers": 1}, 100 * 0.5, "cores"),
        ({}, 100, {"workers": 3}, 4 * 10 * 0.5, "cores"),  # one of three makes four shards
        ({}, 100, {"workers": 100}, 10 * 0.5, "too few shards"),
        ({}, 5, {"workers": 1}, 5 * 0.5, "cores"),  # a shard that is short
        (ON_GPU, 1000, {"workers": 4, "gpus": 1}, 25 * 10 * 0.11, "cores"),
        (ON_GPU, 100_000, {"workers": 100, "gpus": 1}, 100_000 * 0.01, "GPUs"),
        ({}, 1000, {"workers": 4, "store_bytes_s": 1e5}, 1000.0, "store"),
    ],
)
def test_the_slowest_decides(
    changes: Any, samples: int, machines: Any, seconds: float, bottleneck: str
) -> None:
    found = predict(known(**changes), samples, 10, **machines)
    assert (found.seconds, found.bottleneck) == (pytest.approx(10 + seconds), bottleneck)
    assert found.written_bytes == samples * 1e5


def test_a_recipes_name_and_seed_do_not_change_what_it_costs() -> None:
    demo = load_recipe("demo")
    same = demo.model_copy(update={"name": "mine", "seed": 7})
    assert cost_sha256(same) == cost_sha256(demo) != cost_sha256(load_recipe("paper"))


# --- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rates.save(known(), tmp_path / "rates.yaml")
    return tmp_path / "rates.yaml"


def test_the_papers_dataset_at_three_sizes(file: Path, says: Says) -> None:
    given = ["--rates", str(file), "--cores", "64", "--price-core-hour", "0.05"]
    said = says(0, "estimate", "paper", *given)
    assert "4000000 samples (8533 h) in 8000 shards of 500, 400.0 GB" in said
    rows = [line.split() for line in said.splitlines() if line.split()[:1] in (["1"], ["10"])]
    assert rows[0][1] == "64" and rows[1][1] == "640" and rows[0][-1] == "cores"
    assert "assumed: one worker a core" in said


def test_the_same_as_json_with_its_cost(file: Path, says: Says) -> None:
    rates.save(known(**ON_GPU), file)
    options = ["--nodes", "10", "--cores", "64", "--gpus", "2", "--json"]
    prices = ["--price-core-hour", "0.05", "--price-gpu-hour", "2", "--price-gb-month", "0.02"]
    said = says(0, "estimate", "paper", "--rates", file, *options, *prices)
    (only,) = json.loads(said)["estimates"]
    hours = only["seconds"] / 3600
    assert only["cost"] == pytest.approx(10 * (64 * 0.05 + 2 * 2) * hours + 400 * 0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "0"], "--samples must be at least 1"),
        (["--gpus", "-1"], "gpus: Input should be greater than or equal to 0"),
        (["--nodes", "0"], "nodes[0]: Input should be greater than or equal to 1"),
        (["--price-core-hour", "nan"], "price_core_hour: Input should be a finite number"),
        (["--rates", "nowhere.yaml"], "no such file"),
    ],
)
def test_bad_options_are_named(options: list[str], said: str, file: Path, says: Says) -> None:
    assert said in says(2, "estimate", "paper", "--rates", file, *options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (ON_GPU, "of a teacher on a GPU and the machines have none"),
        ({"recipe": "demo", "recipe_sha256": "0"}, "measured on recipe 'demo', this is 'paper'"),
        ({"recipe_sha256": "0"}, "measured on another version of recipe 'paper'"),
    ],
)
def test_rates_that_are_not_the_datasets_are_refused(
    changes: Any, said: str, file: Path, says: Says
) -> None:
    rates.save(known(**changes), file)
    assert said in says(2, "estimate", "paper", "--rates", file)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("start_s: 10", "start_s: -1", "start_s"), ("0.2", "[1", "not readable as YAML")],
)
def test_a_damaged_file_of_rates_is_named(file: Path, old: str, new: str, said: str) -> None:
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"{file}.*{said}"):
        rates.read(file, load_recipe("paper"))


@pytest.mark.slow
def test_what_is_measured_is_what_a_worker_does(corpora: dict[str, list[Path]]) -> None:
    found = estimate.measure(small_recipe(), corpora, estimate.Setup(measure=8, workers=2))
    assert set(found.core_s) >= {"read and mix", "spectral_gating", "opus", "encode", "commit"}
    assert all(0 <= seconds < 60 for seconds in found.core_s.values())
    assert found.core_s["teacher"] > 0 and found.start_s > 0 and not found.gpu_s
    assert 20_000 < found.sample_bytes < 246_000 + 20_000


# --- scale ----------------------------------------------------------------------------------------


def test_a_dataset_without_audio_is_whole_for_every_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench_scale.make(out, 2000, 20)
    assert bench_scale.step_ledger(out) == "20 whole"
    assert bench_scale.step_verify(out) == "20 whole, 1980 samples"
    assert bench_scale.step_status(out).startswith("whole")
    assert bench_scale.step_card(out)
    card = (out / "README.md").read_text()
    assert "1980 samples" in card and "| demucs | 320 |" in card  # a sixth of 99 in each shard
    assert bench_scale.step_plan(out).startswith("2000 samples")


def test_the_trainer_lists_it(tmp_path: Path) -> None:
    bench_scale.make(tmp_path / "out", 1000, 10)
    assert bench_scale.step_listing(tmp_path / "out") == "10 shards"


def test_goals_that_are_missed_are_named() -> None:
    taken = bench_scale.Taken
    assert bench_scale.problems("x", taken(1, 10**8), taken(10, 10**8)) == []
    assert bench_scale.problems("x", taken(0.001, 1), taken(1.9, 1)) == []  # start-up
    wrong = bench_scale.problems("x", taken(1, 1), taken(300, 3 * 10**9))
    assert len(wrong) == 3 and "300 s" in wrong[0] and "3000 MB" in wrong[1]


def test_sizes_that_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(["scale", "--shards", "7"]) == 2
    assert "multiple of 10" in capsys.readouterr().err


def test_a_plans_parquet_names_only_what_occurs() -> None:
    names = np.array([f"{i}.wav" for i in range(1000)], dtype=object)
    found = names_by_index(np.array([5, -1, 900, 5]), names)
    assert found.to_pylist() == ["5.wav", None, "900.wav", "5.wav"]
    assert len(found.dictionary) <= 3
    assert names_by_index(np.array([-1, -1]), []).to_pylist() == [None, None]
