"""The preview page of a dataset folder."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_specs.recipe import load_recipe
from data_specs.sample import CROP_SAMPLES, SampleRecord
from pipeline.__main__ import main
from pipeline.audio import decode_flac
from pipeline.dataset import preview
from pipeline.dataset.prepare import prepare
from pipeline.render.render import render_group
from tests.conftest import small_recipe
from tests.fake_dataset import fake_plan, fake_record, write_dataset


def test_the_page_plays_samples_of_every_shard(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "shards", shards=3, samples=4)
    assert main(["preview", str(folder), "--out", str(tmp_path / "p.html"), "--count", "7"]) == 0
    html = (tmp_path / "p.html").read_text("utf-8")
    assert html.count("<audio") == html.count("<img") == 7
    keys = [int(key) for key in re.findall(r'id="k(\d+)"', html)]
    assert sorted(set(keys)) == keys and {key // 4 for key in keys} == {0, 1, 2}
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "slt &lt;b&gt;" in html and "replay 000000000" in html


def test_a_small_dataset_gives_what_it_has(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, shards=1, samples=2)
    assert len(list(preview.spread(folder, 12))) == 2


def test_a_shard_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, shards=2, samples=2)
    (folder / "shard-000001.json").unlink()
    assert {tar.stem for _, (tar, _, _) in preview.spread(folder, 12)} == {"shard-000000"}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("nothing there", "not a dataset folder"),
        ("no shard", "no whole shard"),
        ("truncated", "damaged"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_it: str, message: str
) -> None:
    folder = tmp_path / "shards"
    if break_it != "nothing there":
        write_dataset(folder, shards=1)
    tar = folder / "shard-000000.tar"
    if break_it == "no shard":
        tar.unlink()
    if break_it == "truncated":
        tar.write_bytes(tar.read_bytes()[:100_000])
    assert main(["preview", str(folder), "--out", str(tmp_path / "p.html")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(folder) in said and message in said
    assert not (tmp_path / "p.html").exists()


def test_a_sample_for_each_processor_and_the_least_else(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "shards", shards=2, samples=20)
    out = tmp_path / "p.html"
    assert main(["preview", str(folder), "--out", str(out), "--each-processor"]) == 0
    titles = re.findall(r'id="k([^"]+)"', out.read_text("utf-8"))
    assert titles == ["equalise", "opus", "spectral_gating"]
    found = dict(preview.every_processor(folder, load_recipe("demo")))

    def effects(plan: dict) -> int:
        kinds = [step["kind"] for step in plan["steps"] if step["kind"] != "none"]
        return len(kinds) + bool(plan["room"]) + bool(plan["noise"])

    all_plans = [fake_plan(index) for index in range(40)]
    with_opus = [p for p in all_plans if any(step["kind"] == "opus" for step in p["steps"])]
    assert (
        effects(found["opus"][1].plan)
        == min(map(effects, with_opus))
        < max(map(effects, with_opus))
    )


def test_the_recording_stands_beside_it(corpora: dict[str, list[Path]], tmp_path: Path) -> None:
    job = prepare(small_recipe(), corpora, tmp_path, 40)
    plan = next(p for p in job.plans(range(40)) if p.noise and p.noise.snr_db < 10)
    record = SampleRecord.model_validate(
        json.loads(fake_record(plan.index)) | {"plan": plan.model_dump(mode="json")}
    )
    original = preview._original(record, job.roots)
    pcm = decode_flac(base64.b64decode(original["audio"].partition(",")[2]))
    (noisy,) = render_group([plan], job.roots)
    assert len(pcm) == CROP_SAMPLES
    quiet = np.abs(pcm) < 3  # pauses, where only the noise sounds
    assert quiet.mean() > 0.1
    assert np.abs(noisy.pcm[quiet]).mean() > 10 * np.abs(pcm[quiet]).mean()
