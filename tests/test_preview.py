"""The preview page of a dataset folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_dataset import write_dataset

from pipeline import preview


def test_the_page_plays_samples_of_every_shard(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "shards", shards=3, samples=4)
    assert preview.main([str(folder), "--out", str(tmp_path / "p.html"), "--count", "7"]) == 0
    html = (tmp_path / "p.html").read_text("utf-8")
    assert html.count("<audio") == html.count("<img") == 7
    keys = [int(key) for key in re.findall(r'id="k(\d+)"', html)]
    assert sorted(set(keys)) == keys and {key // 4 for key in keys} == {0, 1, 2}
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "slt &lt;b&gt;" in html and "replay 000000000" in html


def test_a_small_dataset_gives_what_it_has(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, shards=1, samples=2)
    assert len(preview.choose(folder, 12)) == 2


def test_a_shard_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, shards=2, samples=2)
    (folder / "shard-000001.json").unlink()
    assert {card["shard"] for card in preview.choose(folder, 12)} == {"shard-000000"}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [("nothing there", "not there"), ("no shard", "no whole shard"), ("truncated", "damaged")],
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
    assert preview.main([str(folder), "--out", str(tmp_path / "p.html")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(folder) in said and message in said
    assert not (tmp_path / "p.html").exists()
