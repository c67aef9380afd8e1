"""The throughput model against arithmetic that a reader can check, and a simulation."""

from __future__ import annotations

import heapq
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_specs.recipe import Recipe, load_recipe
from pipeline.__main__ import main
from pipeline.cluster import estimate, rates, throughput
from pipeline.cluster.throughput import Cluster, Rates, Store, predict, slowdown, uses
from pipeline.dataset.prepare import prepare
from pipeline.render.plan import BLOCK, make_table, plan_block
from tests.bench import scale as bench_scale
from tests.bench.__main__ import main as run_bench
from tests.conftest import small_recipe


def known(**changes: Any) -> Rates:
    """Half a second a sample: 0.1 in each of mix, encode, teacher and commit, 0.1 in processors."""
    values: dict[str, Any] = {"driver_s": 3.0, "import_s": 2.0, "worker_s": 5.0}
    values |= {"mix_s": 0.1, "encode_s": 0.1, "teacher_s": 0.1, "commit_s_per_shard": 1.0}
    values |= {"processors": {"opus": 0.2}, "bytes_written": 100_000.0, "bytes_read": 300_000.0}
    return Rates(**values | changes)


def one_stage(**changes: Any) -> Recipe:
    stage = {"stage": "codec", "probability": 0.5, "choices": [{"use": {"kind": "opus"}}]}
    none: dict[str, Any] = {"speech_stages": [], "stages": [stage], "shard_samples": 10}
    return small_recipe(**none | {"group_samples": 5} | changes)


def test_a_worker_alone_takes_the_sum_of_its_stages() -> None:
    found = predict(one_stage(), known(), 100, Cluster(separate=False))
    assert found.core_s == pytest.approx(0.5)
    assert found.seconds == pytest.approx(3 + 5 + 50)
    assert (found.bottleneck, found.shards, found.tail_s) == ("cores", 10, 0)


def test_shards_are_dealt_whole() -> None:
    found = predict(one_stage(), known(), 100, Cluster(cores=3))
    assert found.seconds == pytest.approx(10 + 4 * 10 * 0.5)  # one of three makes four shards
    assert found.tail_s == pytest.approx(20 - 50 / 3)
    many = predict(one_stage(), known(), 100, Cluster(nodes=5, cores=20))
    assert many.seconds == pytest.approx(10 + 5)
    assert many.bottleneck == "shards' size"


@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 40))
def test_the_busiest_worker_is_that_of_a_simulation(samples: int, shard: int, workers: int) -> None:
    heap = [0] * workers
    for first in range(0, samples, shard):
        heapq.heapreplace(heap, heap[0] + min(shard, samples - first))
    assert throughput._makespan(samples, shard, workers) == max(heap)


@given(st.integers(1, 200), st.integers(1, 200))
def test_more_machines_never_take_longer(few: int, more: int) -> None:
    few, more = sorted((few, more))
    slow, quick = (predict(one_stage(), known(), 5000, Cluster(nodes=n)) for n in (few, more))
    assert quick.seconds <= slow.seconds + 1e-6


def test_two_at_once_are_slower_each() -> None:
    both = known(together=1.2, cores=2)
    assert [slowdown(both, n) for n in (1, 2, 64)] == [1.0, 1.2, 1.2]
    assert slowdown(known(together=1.3, cores=4), 2) == pytest.approx(1.1)
    found = predict(one_stage(), both, 100, Cluster(cores=2))
    assert found.seconds == pytest.approx(10 + 25 * 1.2)


def test_a_teacher_on_gpus_leaves_the_cores() -> None:
    fast = known(gpu={"teacher": 0.01})
    found = predict(one_stage(), fast, 1000, Cluster(cores=4, gpus=1))
    assert "teacher" not in found.sample_s and found.gpu_s == 0.01
    assert found.parts["GPUs"] == pytest.approx(10)
    assert found.bottleneck == "cores"
    starved = predict(one_stage(), fast, 100_000, Cluster(cores=100, gpus=1))
    assert starved.bottleneck == "GPUs"
    assert starved.seconds == pytest.approx(10 + 1000)


def test_where_the_bottleneck_moves() -> None:
    store = Store(node_bytes_s=1e9, bytes_s=2e6, gets_s=1e4, remote_corpora=True)
    found = predict(one_stage(), known(), 100_000, Cluster(nodes=4, cores=8, store=store))
    assert found.parts["the store's bandwidth"] == pytest.approx(100_000 * 4e5 / 2e6)
    assert found.bottleneck == "the store's bandwidth"
    few = Store(gets_s=10, remote_corpora=True)
    asked = predict(one_stage(), known(), 10_000, Cluster(nodes=9, cores=90, store=few))
    assert asked.parts["the store's requests"] == pytest.approx(10_000 * (1 + 0.67 + 0.33) / 10)
    slow = Cluster(nodes=100, cores=100, driver_shard_s=10.0)
    assert predict(one_stage(), known(), 10_000, slow).bottleneck == "listing and commit"


def test_a_worker_waits_for_its_upload() -> None:
    narrow = Cluster(cores=4, store=Store(node_bytes_s=1e6))
    found = predict(one_stage(), known(), 400, narrow)
    assert found.seconds == pytest.approx(10 + 100 * (0.5 + 4 * 1e5 / 1e6))


def test_a_processor_without_a_rate_is_named() -> None:
    with pytest.raises(ValueError, match=r"no rate for processor 'opus'.*--rate opus=X"):
        predict(one_stage(), known(processors={}), 100, Cluster())


def test_the_shares_are_those_that_the_plan_draws(corpora: dict[str, list[Path]]) -> None:
    from pipeline.dataset.prepare import scan_all

    recipe = small_recipe()
    manifests = scan_all(recipe, corpora, progress=False)
    tables = {
        role: make_table(manifests[source.corpus], source, role, "train")
        for role, source in recipe.sources.present().items()
    }
    block = plan_block(recipe, tables, 0, BLOCK)
    drawn: dict[str, float] = {}
    for stage in recipe.all_stages():
        chosen = block[f"stage.{stage.stage}"]
        for i, option in enumerate(stage.choices):
            drawn[option.use.kind] = float(np.mean(chosen == i))
    assert drawn == pytest.approx(uses(recipe), abs=0.01)


def test_voices_take_no_processor() -> None:
    shares = uses(load_recipe("paper"))
    assert shares["demucs"] == pytest.approx(0.85 / 5)
    assert shares["lpcnet"] == pytest.approx(0.85 * 0.33 / 2)


# --- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rates.yaml"
    kinds = dict.fromkeys(load_recipe("paper").kinds(), 0.2)
    rates.save(known(processors=kinds, gpu={"teacher": 0.02}), path)
    return path


def test_rates_come_back_from_their_file(file: Path) -> None:
    assert rates.read(file).processors["demucs"] == 0.2
    file.write_text(file.read_text().replace("mix_s: 0.1", "mix_s: -1"))
    with pytest.raises(ValueError, match="mix_s"):
        rates.read(file)


def test_the_papers_dataset_at_three_sizes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--rates", str(file), "--cores", "64", "--price-core-hour", "0.05"]
    assert main(["estimate", "paper", *given]) == 0
    said = capsys.readouterr().out
    assert "4000000 samples (8533 h) in 8000 shards of 500, 400.0 GB" in said
    rows = [line.split() for line in said.splitlines() if line.split()[:1] in (["1"], ["10"])]
    assert rows[0][1] == "64" and rows[1][1] == "640"
    assert "assumed: one worker a core" in said


def test_the_same_as_json_with_its_cost(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "10", "--cores", "64", "--gpus", "2", "--json"]
    prices = ["--price-core-hour", "0.05", "--price-gpu-hour", "2", "--price-gb-month", "0.02"]
    assert main(["estimate", "paper", "--rates", str(file), *options, *prices]) == 0
    (only,) = json.loads(capsys.readouterr().out)["clusters"]
    hours = only["prediction"]["seconds"] / 3600
    assert only["cost"] == pytest.approx(10 * (64 * 0.05 + 2 * 2) * hours + 400 * 0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rate", "opus"], "write NAME=X"),
        (["--rate", "opus=-3"], "write NAME=X"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--gpus", "-1"], "--gpus must be 0 or more"),
        (["--rates", "nowhere.yaml"], "no such file"),
    ],
)
def test_bad_options_are_named(
    options: list[str], said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", "paper", "--rates", str(file), *options]) == 2
    assert said in capsys.readouterr().err


def test_gpus_without_a_rate_are_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates.save(known(), file)
    assert main(["estimate", "paper", "--rates", str(file), "--gpus", "1"]) == 2
    assert "nothing has a rate on a GPU" in capsys.readouterr().err


def test_a_given_rate_is_times_real_time(file: Path) -> None:
    found = rates.with_given(known(missing=("lpcnet",)), rates.given(["lpcnet=7.68"], "--rate"), {})
    assert (found.processors["lpcnet"], found.missing) == (1.0, ())
    taught = rates.with_given(known(), {"teacher": 0.5}, {"teacher": 0.25})
    assert (taught.teacher_s, taught.gpu) == (0.5, {"teacher": 0.25})


def test_a_rate_nobody_asked_for_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates.save(known(), file)
    for option in ("--rate", "--gpu-rate"):
        assert main(["estimate", "paper", "--rates", str(file), option, "teecher=9"]) == 2
        assert "unknown rate 'teecher'; did you mean 'teacher'?" in capsys.readouterr().err


def test_a_teacher_timed_on_a_gpu_has_no_rate_on_a_core(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processors = dict.fromkeys(load_recipe("paper").kinds(), 0.1)
    rates.save(known(teacher_s=None, gpu={"teacher": 0.01}, processors=processors), file)
    assert main(["estimate", "paper", "--rates", str(file)]) == 2
    assert "the teacher was timed on a GPU" in capsys.readouterr().err
    assert main(["estimate", "paper", "--rates", str(file), "--gpus", "1"]) == 0
    assert main(["estimate", "paper", "--rates", str(file), "--rate", "teacher=5"]) == 0


def test_what_has_no_stand_in_is_said_before_minutes_are_spent() -> None:
    estimate._require_rates(set())
    with pytest.raises(ValueError, match=r"demucs, lpcnet: .*--rate demucs=X --rate lpcnet=X"):
        estimate._require_rates({"lpcnet", "demucs"})


@pytest.mark.slow
def test_a_calibration_measures_what_a_worker_does(
    corpora: dict[str, list[Path]], tmp_path: Path
) -> None:
    job = prepare(small_recipe(), corpora, tmp_path / "out", 8, progress=False)
    found = rates.measure(job, 1.0)
    assert set(found.processors) >= {"equalise", "spectral_gating", "opus", "band_limit"}
    assert all(0 < seconds < 60 for seconds in found.processors.values())
    for value in (found.mix_s, found.encode_s, found.teacher_s, found.commit_s_per_shard):
        assert 0 < value < 60
    assert 20_000 < found.bytes_written < 246_000 + 20_000
    seconds = predict(job.recipe, found, 8, Cluster(separate=False)).seconds
    assert math.isfinite(seconds) and seconds > 8 * found.teacher_s


def test_what_a_sample_reads_of_its_corpora(corpora: dict[str, list[Path]], tmp_path: Path) -> None:
    from pipeline.dataset.job import Job
    from pipeline.dataset.prepare import scan_all

    recipe = small_recipe()
    manifests = scan_all(recipe, corpora, progress=False)
    job = Job(recipe, {}, 8, tmp_path, corpora, manifests=manifests)
    # Speech is 16 bit at 16 kHz: 7.68 s are 245 760 bytes; noise and rooms come on top.
    assert 245_760 < rates.bytes_read(job) < 245_760 + 0.67 * 900_000 + 0.33 * 40_000


# --- scale ----------------------------------------------------------------------------------------


def test_a_dataset_without_audio_is_whole_for_every_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench_scale.make(out, 2000, 20)
    assert bench_scale.step_ledger(out) == "20 whole"
    assert bench_scale.step_verify(out) == "20 whole, 1980 samples"
    assert bench_scale.step_status(out).startswith("whole")
    assert bench_scale.step_card(out)
    card = (out / "README.md").read_text()
    assert "1980 samples" in card and "| demucs | 320 |" in card  # 16 of 99 in each shard
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


@pytest.mark.parametrize(("options", "said"), [(["--shards", "7"], "multiple of 10")])
def test_sizes_that_do_not_divide_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(["scale", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_plans_parquet_names_only_what_occurs() -> None:
    from pipeline.verbs import _dictionary

    names = np.array([f"{i}.wav" for i in range(1000)], dtype=object)
    found = _dictionary(np.array([5, -1, 900, 5]), names)
    assert found.to_pylist() == ["5.wav", None, "900.wav", "5.wav"]
    assert len(found.dictionary) <= 3
    assert _dictionary(np.array([-1, -1]), []).to_pylist() == [None, None]
