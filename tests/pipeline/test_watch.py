"""What a user sees of a job: its line, its status, its metrics and its card."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_specs.io.storage import LocalFolder
from data_specs.sample import sample_key
from pipeline.__main__ import main
from pipeline.corpora.manifest import SCHEMA, Manifest
from pipeline.dataset import attempts, card
from pipeline.dataset.description import open_folder
from pipeline.dataset.job import CLIP_HOURS, Job
from pipeline.dataset.shards import MOS_BINS, commit, mos_bin, read_record, summarise
from pipeline.engine import ray_cluster, ray_engine, status, watch
from pipeline.engine.watch import METRICS, Progress, Watch, duration, line, measures
from pipeline.render.label import Row
from tests import engines
from tests.conftest import ROOT
from tests.drills.drill_cluster import wait_for
from tests.pipeline.conftest import Says
from tests.sketches import Sketcher, sketch_job

SIZE = 4
SAMPLES = 14  # three shards of four, one of two


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def tick(seen: Watch) -> None:
    """What its threads do at each look at the clock."""
    seen._show()
    seen._beat()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


EXPORTED = "ray_"
"""What Ray puts before the name of a metric that it exports to Prometheus."""

LICENCES = {"speech": "CC BY 4.0", "noise": "CC BY-SA 3.0", "rooms": "Apache 2.0"}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A dataset folder without a shard."""
    plain = sketch_job(tmp_path / "out", SAMPLES)
    found = {name: licensed(plain.manifests[name], licence) for name, licence in LICENCES.items()}
    roots = {name: [tmp_path / "secret" / name] for name in LICENCES}
    job = replace(plain, roots=roots, manifests=found)
    open_folder(job)
    return job


def licensed(manifest: Manifest, licence: str) -> Manifest:
    column = pa.array([licence] * len(manifest.table))
    place = SCHEMA.get_field_index("licence")
    return replace(manifest, table=manifest.table.set_column(place, "licence", column))


def record(index: int) -> dict[str, Any]:
    steps = [{"stage": "enhance", "kind": "spectral_gating", "params": {}}] if index % 2 else []
    noise = {"corpus": "noise", "root": 0, "path": "0.wav"} if index % 3 == 0 else None
    plan = {
        "speech": {"corpus": "speech", "language": "en" if index % 2 else ""},
        "noise": noise,
        "room": None,
        "steps": steps,
    }
    mos = {"mos": 1 + (index % 40) / 10, "pcm_sha256": "d" * 64}
    return {"key": sample_key(index), "licences": ["MIT"] if steps else [], "plan": plan, **mos}


def row(index: int) -> Row:
    if index % SIZE == 1:
        return Row(sample_key(index), None, None, "silent", "/secret/speech/0.wav is silent")
    return Row(sample_key(index), b"x" * 100, json.dumps(record(index)).encode())


def make(job: Job, *numbers: int) -> None:
    for shard in numbers:
        commit(job.out, shard, [row(i) for i in job.shard_range(shard)], job.dataset_hash, 0.5)


def watching(job: Job, stream: io.StringIO, clock: Clock, **options: Any) -> Watch:
    return Watch(job, job.todo(), "local", 1, stream=stream, clock=clock, **options)


# --- lines, bar, heartbeat ------------------------------------------------------------------------


def test_a_log_gets_one_line_every_half_minute_and_no_bar(job: Job) -> None:
    stream, clock = io.StringIO(), Clock()
    seen = watching(job, stream, clock)
    seen.report(0, 0)
    for _ in range(40):
        clock.now += 2
        tick(seen)
    assert len(stream.getvalue().splitlines()) == 2  # at 30 s and at 60 s
    assert "\r" not in stream.getvalue()


def test_a_store_that_hangs_holds_no_line(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock, goes_on = io.StringIO(), Clock(), threading.Event()
    monkeypatch.setattr(watch, "TICK_S", 0.01)
    with watching(job, stream, clock):
        held = threading.Event()
        monkeypatch.setattr(attempts, "write_attempts", lambda *_: held.set() or goes_on.wait(20))
        clock.now += attempts.HEARTBEAT_S + 1
        assert held.wait(20)
        lines = len(stream.getvalue().splitlines())
        clock.now += watch.LINE_S + 1
        wait_for(lambda: len(stream.getvalue().splitlines()) > lines, 10, "no line meanwhile")
        goes_on.set()


def test_the_line_says_what_one_asks_for(job: Job) -> None:
    stream, clock = io.StringIO(), Clock()
    make(job, 3)
    seen = watching(job, stream, clock)
    tick(seen)
    seen.report(0, 0)
    clock.now += 10
    seen.report(0, 4)
    make(job, 0)
    seen.ended(0, "")
    seen.report(1, 0)
    seen.report(2, 0)
    clock.now += 20
    seen.ended(2, "OSError: gone")
    tick(seen)
    said = stream.getvalue()
    for text in (
        "shards 2/4 (1 in flight, 1 failed)",
        "0.13 samples/s",  # 4 in 30 s
        "1.0 x real time",
        "left 00:01:00",  # 8 more
        "oldest 00:00:20",
        "dropped 1 silent",
        "retries 0",
    ):
        assert text in said, (text, said)


def test_rates_are_of_the_last_minutes(job: Job) -> None:
    clock = Clock()
    seen = watching(job, io.StringIO(), clock)
    clock.now += 500  # start-up
    tick(seen)
    for _ in range(400):
        clock.now += 2
        seen.report(0, 2)
        tick(seen)
    assert seen.progress().rate == pytest.approx(1.0, rel=0.02)
    for _ in range(151):
        clock.now += 2
        tick(seen)
    assert seen.progress().rate == pytest.approx(0.0, abs=0.01)


def test_a_terminal_gets_a_bar_and_no_lines(job: Job) -> None:
    stream, clock = Terminal(), Clock()
    with watching(job, stream, clock) as seen:
        seen.report(0, 5)
        clock.now += 31
        tick(seen)
    assert "samples:" in stream.getvalue() and "retries 0" in stream.getvalue()
    assert "in flight," not in stream.getvalue()


def test_a_short_run_says_nothing_and_yet_has_a_ledger(job: Job) -> None:
    stream = io.StringIO()
    with watching(job, stream, Clock()) as seen:
        seen.report(1, 0)
    (found,) = attempts.read_attempts(job.out)
    assert stream.getvalue() == ""
    assert (found.ended, list(found.running), found.shards) == ("done", [1], 4)


def test_a_shard_is_in_flight_from_its_first_report_to_its_end(job: Job) -> None:
    clock = Clock()
    seen = watching(job, io.StringIO(), clock)
    for shard in (1, 2, 3):
        seen.report(shard, 0)
    clock.now += 10
    seen.retry(1)
    seen.ended(2, "")
    seen.report(2, 4)  # it comes late
    found = seen.progress()
    assert (found.samples, found.retries, found.running, found.oldest_s) == (4, 1, 1, 10.0)
    seen.report(1, 0)
    assert (seen.progress().running, seen.progress().done) == (2, 1)


def test_a_job_that_waits_for_another_of_its_run_says_nothing(job: Job) -> None:
    stream, clock = io.StringIO(), Clock()
    seen = watching(job, stream, clock, waits=True)
    clock.now += 40
    tick(seen)
    assert stream.getvalue() == ""
    seen.report(0, 0)
    tick(seen)
    assert len(stream.getvalue().splitlines()) == 1
    for shard in job.todo():
        seen.ended(shard, "")
    clock.now += 40
    tick(seen)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_folder_that_cannot_be_written_harms_no_job(job: Job) -> None:
    (job.out / attempts.ATTEMPTS).write_text("in the way")
    with watching(job, io.StringIO(), Clock()) as seen:
        seen.report(0, 1)
    assert attempts.read_attempts(job.out) == []


def test_a_sink_hears_all_and_may_fail(job: Job) -> None:
    heard: list[Progress] = []

    def broken(progress: Progress) -> None:
        raise RuntimeError("no network")

    seen = watching(job, io.StringIO(), Clock())
    with seen.sending(broken), seen.sending(heard.append):
        tick(seen)
        seen.report(0, 3)
    tick(seen)
    assert [progress.samples for progress in heard] == [0, 3]


def test_a_log_that_was_closed_ends_nothing(job: Job) -> None:
    stream, clock = io.StringIO(), Clock()
    seen = watching(job, stream, clock)
    stream.close()
    clock.now += 31
    tick(seen)


def test_a_part_counts_its_own_shards(job: Job) -> None:
    seen = Watch(job, [1, 3], "local", 1, 0, stream=io.StringIO(), clock=Clock())
    assert (seen.progress().shards, seen.progress().done) == (2, 0)


def test_an_error_ends_the_run_by_its_name(job: Job) -> None:
    with (
        pytest.raises(OSError, match="No space"),
        watching(job, io.StringIO(), Clock()),
    ):
        raise OSError(28, "No space left")
    assert attempts.read_attempts(job.out)[0].ended == "OSError: [Errno 28] No space left"


@given(st.floats(0, 1e7))
def test_durations_are_exact_to_the_second(seconds: float) -> None:
    days, _, clock = duration(seconds).rpartition(" d ")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    assert int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + rest == round(seconds)


# --- engines --------------------------------------------------------------------------------------


def sketcher(job: Job, _: object) -> Sketcher:
    """At the top of a module, so that a pool's processes find it."""
    return Sketcher(job)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_engine_tells_the_watch_and_the_ledger(job: Job, workers: int) -> None:
    outcome = engines.run(job, "local", workers, factory=sketcher)
    assert sorted(outcome.made) == [0, 1, 2, 3]
    (found,) = attempts.read_attempts(job.out)
    assert (found.samples, found.made, found.running, found.ended) == (SAMPLES, 4, {}, "done")


def test_a_worker_that_raises_leaves_nothing_in_flight(job: Job) -> None:
    class Broken(Sketcher):
        def make(self, rows: range) -> list[Row]:
            raise RuntimeError("broken")

    outcome = engines.run(job, "local", 1, factory=lambda j, _: Broken(j))
    assert sorted(outcome.failed) == [0, 1, 2, 3] and "broken" in outcome.failed[0]
    assert attempts.read_attempts(job.out)[0].running == {}


# --- status ---------------------------------------------------------------------------------------


def write_attempts(job: Job, **changes: Any) -> None:
    values: dict[str, Any] = {"engine": "ray", "workers": 2, "shards": 4, "began": 900.0}
    values |= {"run": attempts.new_run(900.0), "updated": 1_000.0} | changes
    attempts.write_attempts(job.out, attempts.Attempts(**values))


def test_status_while_at_work(job: Job) -> None:
    make(job, 0, 1)
    write_attempts(job, running={2: 960.0, 1: 940.0}, rate=0.5, retries=1)
    found = status.look(job.out, now=1_010.0)
    assert (found.state, found.exit_status) == ("running", 3)
    assert (found.done, found.in_flight, found.oldest_s) == (2, 1, 50.0)  # 1 is whole meanwhile
    assert (found.samples, found.dropped, found.retries) == (6, {"silent": 2}, 1)
    assert found.left_s == 12.0  # 6 samples at one in 2 s
    assert any("left 00:00:12" in text for text in status.lines(found))


def test_status_after_the_driver_died(job: Job) -> None:
    make(job, 0)
    write_attempts(job, running={2: 960.0}, rate=0.5)
    found = status.look(job.out, now=1_000.0 + 5 * attempts.HEARTBEAT_S)
    assert (found.state, found.exit_status, found.in_flight) == ("stopped", 4, 0)
    assert (found.rate, found.left_s, found.retries) == (0, None, 1)
    assert "silent" in found.runs[0]["state"]


def test_status_of_shards_that_failed_until_they_are_made(job: Job) -> None:
    make(job, 0, 2, 3)
    write_attempts(job, failed={1: "TooManyDropped"}, ended="1 shards failed")
    found = status.look(job.out, now=2_000.0)
    assert (found.state, found.exit_status, found.failed) == ("failed", 1, {1: "TooManyDropped"})
    write_attempts(job, run=attempts.new_run(1_900.0), updated=1_990.0, running={1: 1_950.0})
    again = status.look(job.out, now=2_000.0)
    assert (again.state, again.failed, again.retries) == ("running", {}, 1)
    make(job, 1)
    whole = status.look(job.out, now=3_000.0)
    assert (whole.state, whole.exit_status, whole.failed) == ("whole", 0, {})


def test_status_looks_again_where_a_record_vanishes(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(job, 0, 1)
    read = LocalFolder.read

    def vanishing(folder: LocalFolder, names: Sequence[str], limit: int) -> list[bytes]:
        if "shard-000001.json" in names:
            (folder.path / "shard-000001.json").unlink(missing_ok=True)  # it is made again
        return read(folder, names, limit)

    monkeypatch.setattr(LocalFolder, "read", vanishing)
    found = status.look(job.out, now=1.0)
    assert (found.done, "no record" in found.wrong[1]) == (1, True)


def test_status_names_what_is_not_whole(job: Job) -> None:
    make(job, 0, 1, 2, 3)
    (job.out / "shard-000001.tar").write_bytes(b"cut")
    (job.out / "shard-000002.json").unlink()
    (job.out / "shard-000003.json").write_text("{}")
    found = status.look(job.out, now=1.0)
    assert found.done == 1
    assert "3 bytes" in found.wrong[1] and "no record" in found.wrong[2]
    assert "not a shard record" in found.wrong[3]


def test_status_as_json_and_by_exit_status(job: Job, says: Says, tmp_path: Path) -> None:
    told = json.loads(says(4, "status", job.out, "--json"))
    assert (told["state"], told["shards"], told["planned"]) == ("stopped", 4, SAMPLES)
    assert "not a dataset folder" in says(2, "status", tmp_path / "nowhere")


def test_an_unreadable_attempts_file_is_left_out(job: Job) -> None:
    write_attempts(job)
    (job.out / attempts.ATTEMPTS / "zzz.json").write_text('{"format": 99}')
    assert len(attempts.read_attempts(job.out)) == 1


# --- metrics --------------------------------------------------------------------------------------

DASHBOARD = ROOT / "pipeline/grafana.json"


def progress(**changes: Any) -> Progress:
    values: dict[str, Any] = {"shards": 9, "done": 2, "failed": 1, "running": 3, "samples": 5}
    values |= {"rate": 2.0, "left_s": 7.0, "oldest_s": 1.0, "retries": 4}
    return Progress(**values | {"dropped": {"silent": 2}} | changes)


def test_every_metric_is_measured_with_its_labels() -> None:
    found = list(measures(progress()))
    assert {name for name, _, _ in found} == {metric.name for metric in METRICS}
    labels = {metric.name: set(metric.labels) for metric in METRICS}
    assert all(set(given) == labels[name] for name, given, _ in found)
    states = {given["state"]: value for name, given, value in found if "state" in given}
    assert states == {"done": 2, "in_flight": 3, "failed": 1, "waiting": 3}
    assert "pipeline_seconds_left" not in {name for name, _, _ in measures(progress(left_s=None))}


def queries(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for key, text in value.items() if key in ("expr", "query") and text)
        for inner in value.values():
            yield from queries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from queries(inner)


def test_the_dashboard_asks_for_metrics_that_are_exported() -> None:
    asked = [text for text in queries(json.loads(DASHBOARD.read_text())) if isinstance(text, str)]
    named = {name for text in asked for name in re.findall(r"\bray_\w+", text)}
    exported = {f"{EXPORTED}{metric.name}": metric for metric in METRICS}
    assert named == set(exported)  # none that is not there, none that is not shown
    for text in asked:
        labels = set(re.findall(r"(\w+)\s*=~?\s*\"", text))
        labels |= set(re.findall(r"by \((\w+)\)", text))
        assert labels <= {*watch.LABELS, "state", "reason"}, text


@pytest.mark.slow
def test_a_cluster_exports_the_metrics() -> None:
    """As a Prometheus server would read them, from the port that Ray's node gives."""
    import time
    import urllib.request

    import ray

    ray_cluster.start_ray(1)
    try:
        send = ray_engine.metrics("small", "a-run")
        port = ray.nodes()[0]["MetricsExportPort"]
        wanted, found = {f"{EXPORTED}{m.name}" for m in METRICS}, set()
        deadline = time.monotonic() + 90
        while wanted - found and time.monotonic() < deadline:
            send(progress())
            time.sleep(2)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                text = page.read().decode()
            found = set(re.findall(r'^(ray_pipeline_\w+)\{[^}]*dataset="small"', text, re.M))
        assert wanted <= found
    finally:
        ray.shutdown()


# --- card -----------------------------------------------------------------------------------------


def front(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def written_card(job: Job) -> str:
    card.write_card(job)
    return (job.out / card.CARD).read_text()


def test_the_card_says_what_a_user_must_know(job: Job) -> None:
    make(job, 0, 1, 2, 3)
    text = written_card(job)
    found = front(text)
    assert found["configs"][0]["data_files"] == [{"split": "train", "path": "shard-*.tar"}]
    assert (found["language"], found["size_categories"]) == (["en"], ["n<1K"])
    assert found["license"] == "other" and "share-alike" in found["license_name"]
    expected = [record(i) for i in range(SAMPLES) if i % SIZE != 1]
    english = sum(r["plan"]["speech"]["language"] == "en" for r in expected)
    gated = sum(bool(r["plan"]["steps"]) for r in expected)
    assert f"| en | {english} | {english * CLIP_HOURS:.2f} |" in text
    assert f"| spectral_gating | {gated} | {gated * CLIP_HOURS:.2f} |" in text
    assert f"- {len(expected)} samples, " in text and "dropped: 4 silent" in text
    assert f"Mean {sum(r['mos'] for r in expected) / len(expected):.3f}" in text
    assert "a" * 64 in text and "| noise | 12 | CC BY-SA 3.0 |" in text


def test_the_card_names_no_folder_and_no_detail(job: Job) -> None:
    make(job, 0, 1, 2, 3)
    text = written_card(job)
    assert "secret" not in text and str(job.out) not in text


def test_the_cards_recipe_makes_the_same_dataset(job: Job, tmp_path: Path) -> None:
    from data_specs.recipe import load_recipe

    make(job, 0)
    text = written_card(job)
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found
    path = tmp_path / "recipe.yaml"
    path.write_text(found[1])
    assert load_recipe(path) == job.recipe
    assert f"--samples {SAMPLES}" in text and "--corpus noise=DIR" in text


def test_the_card_of_a_version_names_the_dataset_that_it_came_from(job: Job) -> None:
    origin = {"dataset_hash": "e" * 64, "samples": 4, "corpora": {}}
    text = card.card(
        replace(job, identity=job.identity | {"derived_from": origin}), attempts.Tally()
    )
    assert "python -m pipeline extend OLD --corpus noise=DIR --corpus rooms=DIR" in text
    assert "e" * 64 in text and "first 4 samples" in text


@pytest.mark.parametrize(
    ("licence", "demands"),
    [
        ("MIT", []),
        ("Apache 2.0", []),
        ("CC-BY-4.0", ["attribution"]),
        ("Apache-2.0 AND CC-BY-NC-4.0", ["non-commercial", "attribution"]),
        ("CC BY-NC-ND 4.0", ["no derivatives", "non-commercial", "attribution"]),
        ("CC BY-SA 3.0", ["share alike", "attribution"]),
        ("LibriVox, public domain in the USA", ["to be read"]),
        ("as the folder's owner says", ["to be read"]),
        ("", ["to be read"]),
    ],
)
def test_licences_and_what_they_ask(licence: str, demands: list[str]) -> None:
    assert list(card.consequences([licence])) == demands


def test_one_licence_that_the_hub_knows_is_named_as_such() -> None:
    assert card.hub_licence(["CC-BY-4.0"]) == {"license": "cc-by-4.0"}
    several = card.hub_licence(["CC-BY-NC-4.0", "MIT"])
    assert several["license_name"] == "several-non-commercial-attribution"


@pytest.mark.parametrize("change", ["mine", "edited", "without its end"])
def test_a_readme_that_is_not_the_card_stays(job: Job, says: Says, change: str) -> None:
    make(job, 0, 1)
    path = job.out / card.CARD
    text = written_card(job)
    assert written_card(job) == text  # its own is written again
    make(job, 2, 3)
    changed = {
        "mine": "my notes\n",
        "edited": text.replace("license: other", "license: mit"),
        "without its end": text[: text.rindex("<!--")],
    }[change]
    assert changed != text
    path.write_text(changed)
    assert str(path) in says(1, "card", job.out)
    assert path.read_text() == changed
    path.unlink()
    assert main(["card", str(job.out)]) == 0
    assert front(path.read_text())["size_categories"] == ["n<1K"]


# --- summaries ------------------------------------------------------------------------------------


@given(st.floats(1, 5))
def test_a_score_is_in_the_bin_that_holds_it(mos: float) -> None:
    low = 1 + mos_bin(mos) / 10
    assert 0 <= mos_bin(mos) < MOS_BINS
    assert low - 1e-6 <= mos <= low + 0.1 + 1e-6


@given(st.lists(st.integers(0, 200), max_size=30))
def test_a_ledger_adds_up_what_its_shards_hold(indices: list[int]) -> None:
    parts = [summarise([record(i)]) for i in indices]
    whole = summarise([record(i) for i in indices])
    assert [sum(column) for column in zip(*(p.mos for p in parts), strict=True)] == (
        list(whole.mos) if indices else []
    )
    assert sum(p.languages.get("en", 0) for p in parts) == whole.languages.get("en", 0)
    assert whole.mos_sum == pytest.approx(sum(record(i)["mos"] for i in indices), abs=1e-5)


def test_the_record_of_a_shard_counts_its_samples(job: Job) -> None:
    make(job, 0)
    found = read_record(job.out, 0)
    assert found and found.summary
    assert found.summary.languages == {"en": 1, "unknown": 2}  # 1 was dropped
    assert found.summary.corpora == {"noise": 2, "speech": 3}


def test_reading_while_a_driver_writes(job: Job) -> None:
    """A file is there whole or not at all, whatever the moment."""
    stop, run_name = threading.Event(), attempts.new_run(900.0)

    def write() -> None:
        while not stop.is_set():
            write_attempts(job, run=run_name, running=dict.fromkeys(range(200), 1.0))

    write_attempts(job, run=run_name, running=dict.fromkeys(range(200), 1.0))
    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert all(len(attempts.read_attempts(job.out)) == 1 for _ in range(50))
    finally:
        stop.set()
        thread.join()


def test_a_line_of_a_run_that_knows_nothing_yet() -> None:
    said = line(progress(rate=0.0, left_s=None, dropped={}), 0.0)
    assert "left ?" in said and "dropped none" in said
