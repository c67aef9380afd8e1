"""Strings of words: spliced as planned, apart by split, the same bytes again."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data_specs.labelled import read_labelled
from pipeline.__main__ import main
from pipeline.dataset import words
from pipeline.render.mix import active_dbfs
from tests.conftest import talk, write
from tests.pipeline.conftest import hashes

Corpora = dict[str, list[Path]]
WORDS = ("bed", "cat", "happy")


def table_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "clips.csv"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three words of each of six speakers, two a split; one of nobody known; one of one alone."""
    folder, rows = tmp_path_factory.mktemp("recordings"), []
    for number in range(6):
        split = ("train", "validation", "test")[number % 3]
        for place, word in enumerate(WORDS):
            wave = np.pad(talk(0.5, 3 * number + place), (4000, 2000))
            path = write(folder / f"s{number}" / f"{word}.wav", wave)
            row = {"path": str(path.relative_to(folder)), "word": word, "speaker": f"s{number}"}
            rows.append(row | {"split": split})
    for name, speaker, split in (("nobody.wav", "", ""), ("once.wav", "s9", "train")):
        write(folder / name, talk(0.5, 99))
        rows.append({"path": name, "word": "bed", "speaker": speaker, "split": split})
    return table_of(folder, rows)


def command(recordings: Path, out: Path, *more: str) -> list[str]:
    counts = ["--strings", "train=4", "test=3"]
    fixed = ["--column", "word", "--workers", "1", "--words", "2", "4"]
    return ["words", str(recordings), "--out", str(out), *counts, *fixed, *more]


def test_strings_are_of_one_speaker_of_their_split(recordings: Path, tmp_path: Path) -> None:
    assert main(command(recordings, tmp_path)) == 0
    clips = read_labelled([tmp_path / "labelled.csv"])
    assert [clip.split for clip in clips] == ["train"] * 4 + ["test"] * 3
    for clip in clips:
        assert clip.speaker in {"train": ("s0", "s3"), "test": ("s2", "s5")}[clip.split or ""]
        said = (clip.text or "").split()
        assert 2 <= len(said) <= 4 and set(said) <= set(WORDS) and clip.text_by == "spliced"
        assert all(one != other for one, other in pairwise(said))
        wave = np.asarray(soundfile.read(clip.path, dtype="float32")[0])
        assert active_dbfs(wave) == pytest.approx(words.LEVEL_DBFS, abs=0.01)


def test_the_same_seed_the_same_bytes_killed_or_not_and_more_only_add(
    recordings: Path, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = ["--noise", str(corpora["noise"][0]), "--rooms", str(corpora["rooms"][0])]
    assert main(command(recordings, tmp_path / "a", *around)) == 0
    make, made = words.make_string, []

    def killed(*args: object) -> object:
        made.append(args)
        if len(made) == 3:
            raise KeyboardInterrupt
        return make(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(words, "make_string", killed)
        assert main(command(recordings, tmp_path / "b", *around)) == 130
    assert main(command(recordings, tmp_path / "b", *around)) == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    again = command(recordings, tmp_path / "b", *around)
    again[again.index("test=3")] = "test=5"
    assert main(again) == 0
    both = [{n: h for n, h in hashes(tmp_path / x).items() if n.endswith(".flac")} for x in "ab"]
    assert both[1].items() > both[0].items() and len(both[1]) == 9
    assert main([*command(recordings, tmp_path / "c", *around), "--seed", "1"]) == 0
    assert not set(hashes(tmp_path / "c").values()) & set(both[0].values())


def test_noise_and_rooms_of_a_split_are_in_no_other(
    recordings: Path, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    draw = words.Drawing.around

    def kept(self: words.Drawing, rooms: Any, noise: Any, split: str, k: int) -> Any:
        found = draw(self, rooms, noise, split, k)
        seen.setdefault(split, set()).update(one.path for one in found if one)
        return found

    monkeypatch.setattr(words.Drawing, "around", kept)
    around = ["--noise", str(corpora["noise"][0]), "--rooms", str(corpora["rooms"][0])]
    counts = ["--strings", "train=20", "validation=20", "test=20", "--room-share", "1"]
    monkeypatch.setattr(words, "make_labelled", lambda *args: 0)
    assert main([*command(recordings, tmp_path, *around), *counts]) == 0
    assert all(len(files) >= 2 for files in seen.values()) and len(seen) == 3
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))


def test_words_lie_over_the_end_of_what_is_before_them() -> None:
    ones = [np.full(count, value, np.float32) for count, value in ((100, 1), (80, 10), (50, 100))]
    whole = words.joined(ones, [0, 30, 60])
    assert len(whole) == 100 + 80 - 30 + 50 - 50  # no more than the word has
    assert list(whole[[69, 70, 99, 100, 149]]) == [1, 11, 11, 110, 110]
    assert len(words.joined(ones, [0, 0, 0])) == 230


def test_overlaps_and_levels_are_drawn_within_their_limits() -> None:
    group = [words.Recording(Path(str(i)), "w", "s", "train") for i in range(3)]
    joints = words.Drawing(seed=3)
    drawn = [joints.pieces([group], "train", k) for k in range(200)]
    assert {len(pieces) for pieces in drawn} == {2, 3, 4, 5, 6}
    overlaps = [piece.overlap for pieces in drawn for piece in pieces[1:]]
    assert all(pieces[0].overlap == 0 for pieces in drawn)
    # Of n uniform draws the extremes are within 1/n of the ends with probability 1 - 2/e or so
    # each; within 5 % of 2400 samples with one of 1 - 2 * .95**600.
    assert 0 <= min(overlaps) < 120 and 2280 < max(overlaps) <= 2400
    levels = [piece.level_dbfs or 0 for pieces in drawn for piece in pieces]
    assert words.LEVEL_DBFS - 3 <= min(levels) < max(levels) <= words.LEVEL_DBFS + 3


def test_what_is_silent_at_the_ends_of_a_recording_is_cut() -> None:
    wave = np.pad(np.full(1600, 0.1, np.float32), (6400, 4800))
    assert len(words.heard(wave)) == 1600 + 2 * 800
    assert len(words.heard(wave + np.float32(0.1))) == len(wave)


def test_a_string_of_unknown_speakers_only_where_it_is_asked_for(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(recordings, tmp_path / "a")) == 0
    said = capsys.readouterr().err
    assert "left out: 1 without a word or a speaker" in said
    assert "left out: 1 speakers of fewer than 2 different words" in said
    assert (
        main([*command(recordings, tmp_path / "b", "--mixed-speakers"), "--words", "6", "6"]) == 0
    )
    speakers = {clip.speaker for clip in read_labelled([tmp_path / "b" / "labelled.csv"])}
    assert None in speakers


def test_sentences_of_voices_with_their_exact_text(tmp_path: Path) -> None:
    rows = [
        {"path": f"en/kokoro/v{i}/{i:06d}.flac", "text": f"Hello,  number {i}.", "language": "en"}
        for i in range(4)
    ]
    rows.append({"path": "de/x/y/000009.flac", "text": "Hallo", "language": "de"})
    for i, row in enumerate(rows):
        write(tmp_path / "voices" / row["path"], talk(1, i))
    (tmp_path / "voices" / "clips.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["words", str(tmp_path / "voices"), "--out", str(tmp_path / "out")]) == 0
    clips = read_labelled([tmp_path / "out" / "labelled.csv"])
    assert sorted(clip.text or "" for clip in clips) == [f"Hello, number {i}." for i in range(4)]
    assert {clip.split for clip in clips} == {"train", "validation", "test"}
    assert all(len(soundfile.read(clip.path)[0]) == 16_000 for clip in clips)


@pytest.mark.parametrize("name", ["../outside.flac", "/etc/hosts", "a/../../b.flac"])
def test_a_record_cannot_lead_out_of_its_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voices = tmp_path / "voices"
    voices.mkdir()
    row = {"path": name, "text": "x", "language": "en"}
    (voices / "clips.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["words", str(voices), "--out", str(tmp_path / "out")]) == 2
    assert "is not a path inside its folder" in capsys.readouterr().err


def test_wrong_input_is_named(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = command(recordings, tmp_path / "out")
    for more, said in (
        (["--strings", "training=3"], "--strings training=3: write SPLIT=N"),
        (["--strings", "test=-1"], "--strings test=-1: write SPLIT=N"),
        (["--words", "3", "2"], "options: (top level): words: 3 is above 2"),
        (
            ["--overlap-ms", "-1", "2"],
            "options: overlap_ms[0]: Input should be greater than or equal to 0",
        ),
        (["--column", "phrase"], "'phrase'"),
    ):
        assert main([*right, *more]) == 2
        assert said in capsys.readouterr().err
    folder = tmp_path / "two"
    folder.mkdir()
    rows = [
        {"path": str(write(folder / f"{i}.wav", talk(0.5, i))), "keyword": "a", "speaker": "s"}
        for i in range(2)
    ]
    table = table_of(
        folder, [r | {"split": s} for r, s in zip(rows, ("train", "test"), strict=True)]
    )
    assert main(["words", str(table), "--out", str(folder / "o"), "--strings", "train=1"]) == 2
    assert "line 3: speaker 's' is in 'test' and in 'train'" in capsys.readouterr().err
