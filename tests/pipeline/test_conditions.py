"""Labelled clips in a grid of rooms and noise: what was asked for is what is in the audio."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_specs.labelled import read_labelled
from pipeline.__main__ import main
from pipeline.dataset import conditions
from pipeline.render.mix import active_dbfs
from tests.conftest import talk, write
from tests.pipeline.conftest import hashes

Corpora = dict[str, list[Path]]


def labelled(folder: Path, *, clips: int = 3) -> Path:
    rows = [
        {"path": f"=clip {i}.wav", "mos": 4.5, "speaker": f"s{i}", "text": "one, two", "split": s}
        for i, s in zip(range(clips), ("train", "test", "test"), strict=False)
    ]
    for i, row in enumerate(rows):
        write(folder / str(row["path"]), talk(2 + i / 8, i))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "labels.csv"


def command(table: Path, corpora: Corpora, out: Path, *more: str) -> list[str]:
    noise, rooms = str(corpora["noise"][0]), str(corpora["rooms"][0])
    sources = ["--noise", noise, "--rooms", rooms, "--unseen-noise", noise, "--unseen-rooms", rooms]
    fixed = ["--rt60", "0.4", "3", "--workers", "1"]
    return ["conditions", str(table), "--out", str(out), *sources, *fixed, *more]


def heard(path: Path) -> np.ndarray:
    return np.asarray(soundfile.read(path, dtype="float32")[0])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def grid(table: Path, corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grid")
    assert main(command(table, corpora, out)) == 0
    return out


def rest(out: Path, name: str, beside: str, index: int) -> tuple[float, np.ndarray]:
    """SNR of a condition in dB, and its noise: what is left without the clip ``beside``.

    Least squares gives the gain that both went through. Over 2 s of white noise it is off by a
    part of .6 % / 10**(SNR / 20), so that the SNR is off by .05 dB at 0 dB; 16 bits add noise at
    -101 dBFS, of -46 dBFS at 20 dB less than .001 dB.
    """
    wave, clean = (
        heard(out / f"{one}/{index:06d}.flac").astype(np.float64) for one in (name, beside)
    )
    part = clean * (wave @ clean) / (clean @ clean)
    return active_dbfs(part.astype(np.float32)) - active_dbfs(
        (wave - part).astype(np.float32)
    ), wave - part


def test_the_default_is_twelve_conditions_each_with_its_twin(grid: Path) -> None:
    clips = read_labelled([grid / "labelled.csv"])
    assert [clip.condition for clip in clips[::3]] == [
        name for name in conditions.GRID if name in conditions.DEFAULT
    ]
    assert len(clips) == 36 == len(list(grid.rglob("*.flac")))
    assert {c.mos for c in clips if c.condition == "clean"} == {4.5}
    assert {c.mos for c in clips if c.condition != "clean"} == {None}
    for clip in clips:
        twin = grid / "clean" / clip.path.name
        assert clip.clean == twin.resolve() and clip.text == "one, two"
        assert len(heard(clip.path)) == len(heard(twin))


@pytest.mark.parametrize(
    ("name", "beside", "snr_db"),
    [("noise20", "clean", 20), ("noise10", "clean", 10), ("noise0-unseen", "clean", 0)],
)
def test_the_snr_is_what_the_name_says(grid: Path, name: str, beside: str, snr_db: int) -> None:
    for index in range(3):
        assert rest(grid, name, beside, index)[0] == pytest.approx(snr_db, abs=0.1)


def test_reverberant_speech_is_what_noise_is_added_to(
    table: Path, corpora: Corpora, tmp_path: Path
) -> None:
    assert main(command(table, corpora, tmp_path, "--conditions", "long", "long-noise5")) == 0
    for index in range(3):
        assert rest(tmp_path, "long-noise5", "long", index)[0] == pytest.approx(5, abs=0.1)


def test_conditions_differ_in_what_their_names_say_alone(grid: Path) -> None:
    for index in range(3):
        (_, soft), (_, loud) = (rest(grid, name, "clean", index) for name in ("noise10", "noise0"))
        assert np.corrcoef(soft, loud)[0, 1] > 0.99  # the same noise from the same place
        other = rest(grid, "noise0-unseen", "clean", index)[1]
        assert abs(np.corrcoef(loud, other)[0, 1]) < 0.1


def test_every_clip_has_one_level(grid: Path) -> None:
    for path in grid.rglob("*.flac"):
        level_dbfs, peak = active_dbfs(heard(path)), np.abs(heard(path)).max()
        assert level_dbfs == pytest.approx(conditions.LEVEL_DBFS, abs=0.01) or peak > 0.98


def test_killed_and_resumed_it_is_the_undisturbed_one(
    grid: Path, table: Path, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = conditions.make_clip, []

    def killed(*args: object) -> object:
        made.append(args)
        if len(made) == 7:
            raise KeyboardInterrupt
        return make(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(conditions, "make_clip", killed)
        assert main(command(table, corpora, tmp_path)) == 130
        assert not (tmp_path / "labelled.csv").exists()
        assert main(command(table, corpora, tmp_path)) == 0
        assert len(made) == 7 + 36 - 6  # nothing twice
    assert hashes(tmp_path) == hashes(grid)


def test_a_further_condition_makes_nothing_again_and_another_seed_is_refused(
    table: Path, corpora: Corpora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = command(table, corpora, tmp_path, "--conditions", "noise10", "noise0-unseen")
    assert main(first) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    assert main([*first, "noise5"]) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    assert after.items() >= before.items() and len(after) == len(before) + 3
    assert main([*first, "--seed", "1"]) == 2
    assert "give another --out or seed" in capsys.readouterr().err


def test_a_cut_clip_loses_its_text(table: Path, corpora: Corpora, tmp_path: Path) -> None:
    more = ["--seconds", "2.1", "--split", "train", "--conditions", "clean"]
    assert main(command(table, corpora, tmp_path / "a", *more)) == 0
    assert [clip.text for clip in read_labelled([tmp_path / "a/labelled.csv"])] == ["one, two"]
    more[3] = "test"
    assert main(command(table, corpora, tmp_path / "b", *more)) == 0
    clips = read_labelled([tmp_path / "b/labelled.csv"])
    assert [(clip.text, clip.mos) for clip in clips] == [(None, None)] * 2
    assert [len(heard(clip.path)) for clip in clips] == [33_600, 33_600]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--conditions", "noise11"], "unknown condition 'noise11'; did you mean"),
        (["--unseen-noise"], "condition 'noise10-unseen' needs --unseen-noise DIR"),
        (["--rt60", "20", "30"], "no room of --rooms is long: an RT60 below 20 s is short"),
        (["--split", "validation"], "no clip of --split validation"),
        (["--seconds", "0"], "--seconds must be from 0 to 3600"),
    ],
)
def test_wrong_options_are_named(
    more: list[str],
    said: str,
    table: Path,
    corpora: Corpora,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(table, corpora, tmp_path)
    if more == ["--unseen-noise"]:
        del words[(at := words.index(more.pop())) : at + 2]
    assert main([*words, *more]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.rglob("*.flac"))


def test_an_unreadable_clip_is_named_once_and_left_out(
    corpora: Corpora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = labelled(tmp_path / "in")
    rows = table.read_text()
    (tmp_path / "x;rm -rf $HOME.wav").write_bytes((tmp_path / "in" / "=clip 0.wav").read_bytes())
    table.write_text(rows.replace("=clip 0.wav", "../x;rm -rf $HOME.wav"))
    bad = tmp_path / "in" / "=clip 1.wav"
    before = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}
    write(bad, np.zeros(32_000, np.float32))
    more = ["--conditions", "noise10", "noise20"]
    assert main(command(table, corpora, tmp_path / "out", *more)) == 1
    assert capsys.readouterr().err.count(f"silent: {bad}") == 1
    clips = read_labelled([tmp_path / "out" / "labelled.csv"])
    assert len(clips) == 6 and {clip.speaker for clip in clips} == {"s0", "s2"}
    made = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}
    assert made == before | {tmp_path / "out"}
