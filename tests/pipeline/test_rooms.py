"""Simulated rooms: what was drawn is what is heard; seeded, resumable, told by their place."""

from __future__ import annotations

import errno
import json
import socket
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from data_specs.corpus import find_corpus
from data_specs.room import RoomSpec, load_rooms
from data_specs.strict import SpecError
from pipeline.__main__ import main
from pipeline.corpora import folder, rooms
from pipeline.corpora.manifest import scan
from tests.pipeline.conftest import Says


def small(**changes: object) -> RoomSpec:
    values: dict[str, object] = {
        "name": "small",
        "seed": 3,
        "width_m": {"distribution": "uniform", "low": 3, "high": 5},
        "depth_m": {"distribution": "uniform", "low": 4, "high": 6},
        "height_m": 2.5,
        "rt60_s": {"distribution": "log_uniform", "low": 0.2, "high": 0.5},
        "distance_m": {"distribution": "uniform", "low": 0.5, "high": 3},
    }
    return RoomSpec.model_validate(values | changes)


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of every file below ``folder`` whose name fits."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty rooms of the shipped spec."""
    out = tmp_path_factory.mktemp("rooms")
    rooms.make_rooms(load_rooms("simulated"), out, 30, workers=2)
    return out


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / rooms.MANIFEST).read_text().splitlines()]


# --- what is heard --------------------------------------------------------------------------------


def test_the_decay_of_the_written_files_tracks_what_was_drawn(thirty: Path) -> None:
    from pyroomacoustics.experimental import measure_rt60

    asked, ours, other = [], [], []
    for record in records(thirty):
        wave, rate_hz = soundfile.read(thirty / record["path"])
        assert rate_hz == 16_000
        asked.append(record["rt60_s"])
        ours.append(rooms.decay_seconds(wave))
        other.append(measure_rt60(wave, fs=16_000, decay_db=30))  # T30, by another's code
    assert len(asked) == 30 and max(asked) / min(asked) > 4
    for measured, mean_limit in ((ours, 0.045), (other, 0.1)):
        errors = np.asarray(measured) / asked - 1
        assert np.corrcoef(asked, measured)[0, 1] > 0.98
        assert np.abs(errors).mean() < mean_limit and abs(errors.mean()) < 0.08
    assert np.abs(np.asarray(ours) / asked - 1).max() <= 0.21  # the spec's tolerance and 16 bits


def test_records_say_what_the_files_are(thirty: Path) -> None:
    spec = load_rooms("simulated")
    for record in records(thirty):
        wave, _ = soundfile.read(thirty / record["path"])
        assert record["measured_rt60_s"] == pytest.approx(rooms.decay_seconds(wave), rel=0.02)
        size = np.array([record[f"{side}_m"] for side in ("width", "depth", "height")])
        source, microphone = np.array(record["source_m"]), np.array(record["microphone_m"])
        for position in (source, microphone):
            assert (position >= 0.2999).all() and (position <= size - 0.2999).all()
        distance = np.linalg.norm(source - microphone)
        assert distance == pytest.approx(record["distance_m"], abs=1e-3)
        assert spec.distance_m.low <= distance <= spec.distance_m.high
        assert 0 < record["absorption"] < 1


def test_the_direct_sound_leads_at_a_fixed_place_and_the_peak_is_set(thirty: Path) -> None:
    for record in records(thirty):
        wave, _ = soundfile.read(thirty / record["path"])
        assert np.abs(wave).max() == pytest.approx(0.9, abs=0.001)
        direct = np.abs(wave[36:46]).max()  # 2.5 ms are 40 samples
        assert 40 <= np.argmax(np.abs(wave[:46])) <= 41
        # pyroomacoustics takes out what is below 10 Hz with zero phase, so a trace comes before.
        assert direct > 0.3 and np.abs(wave[:30]).max() < 0.15 * direct


def test_a_nearer_source_is_more_direct(tmp_path: Path) -> None:
    def direct_share(distance_m: float) -> float:
        waves = [
            rooms.make_room(small(distance_m=distance_m, rt60_s=0.4), f"room{i}")[0]
            for i in range(6)
        ]
        return float(np.median([np.sum(w[:80] ** 2) / np.sum(w**2) for w in waves]))

    assert direct_share(0.5) > 2 * direct_share(3.0)


def test_a_low_image_order_is_continued_to_the_same_decay() -> None:
    for order in (6, 30):
        wave, record = rooms.make_room(small(max_image_order=order, rt60_s=0.5), "room00001.flac")
        assert record["measured_rt60_s"] == pytest.approx(0.5, rel=0.2)
        assert len(wave) > 0.5 * 16_000


@pytest.mark.parametrize("corpus", ["rooms", "open_rooms"])
def test_the_folder_is_a_corpus_of_rooms(corpus: str, thirty: Path) -> None:
    manifest = scan(corpus, find_corpus(corpus, "here"), [thirty], progress=False)
    assert len(manifest.usable) == 30 and not manifest.rejections()
    assert len(set(manifest.usable["speaker"].to_pylist())) == 30  # each room its own group


# --- seeded and resumable -------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_a_larger_count_only_adds(tmp_path: Path) -> None:
    for out, count, workers in (("a", 5, 1), ("b", 5, 2), ("c", 2, 1)):
        rooms.make_rooms(small(), tmp_path / out, count, workers)
    five = hashes(tmp_path / "a")
    assert five == hashes(tmp_path / "b") and len(five) == 12
    two = {name: value for name, value in hashes(tmp_path / "c").items() if name[:4] == "room"}
    two.pop(rooms.MANIFEST)
    assert len(two) == 4 and two.items() < five.items()
    rooms.make_rooms(small(seed=4), tmp_path / "d", 5)
    flacs = {value for name, value in hashes(tmp_path / "d").items() if name.endswith(".flac")}
    assert len(flacs) == 5 and not flacs & set(five.values())


def test_an_interrupted_folder_is_completed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms.make_rooms(small(), tmp_path / "whole", 6)
    make = rooms.make_room

    def interrupted(spec: RoomSpec, name: str):
        if name >= "room00003.flac":
            raise OSError("disk full")
        return make(spec, name)

    monkeypatch.setattr(rooms, "make_room", interrupted)
    out = tmp_path / "cut"
    with pytest.raises(OSError, match="disk full"):
        rooms.make_rooms(small(), out, 6)
    monkeypatch.setattr(rooms, "make_room", make)
    assert len(records(out)) == 3
    # as a kill while writing leaves it
    (out / f".rooms.jsonl.{socket.gethostname()}.4194305.0a1b2c3d.tmp").touch()
    kept = (out / "room00001.flac").stat().st_mtime_ns
    rooms.make_rooms(small(), out, 6)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert (out / "room00001.flac").stat().st_mtime_ns == kept


def test_another_spec_or_seed_never_mixes_in(tmp_path: Path) -> None:
    rooms.make_rooms(small(), tmp_path, 1)
    before = hashes(tmp_path)
    for other in (small(seed=4), small(height_m=2.6)):
        with pytest.raises(ValueError, match=r"made-by\.json: made with .* another --out or seed"):
            rooms.make_rooms(other, tmp_path, 2)
    assert hashes(tmp_path) == before
    rooms.make_rooms(small(about="the same, described"), tmp_path, 1)


def test_a_file_without_its_record_is_named(tmp_path: Path) -> None:
    rooms.make_rooms(small(), tmp_path, 2)
    (tmp_path / "room00001.json").unlink()
    with pytest.raises(ValueError, match=r"room00001\.flac: no record beside it; remove it"):
        rooms.make_rooms(small(), tmp_path, 2)


def test_what_does_not_fit_is_drawn_again_and_at_last_told() -> None:
    spec = small(distance_m={"distribution": "uniform", "low": 4, "high": 6.5})
    redrawn = [rooms.make_room(spec, f"room{i}")[1]["redrawn"] for i in range(10)]
    assert max(redrawn) > 0
    assert redrawn == [rooms.make_room(spec, f"room{i}")[1]["redrawn"] for i in range(10)]
    hopeless = small(rt60_s=0.05, rt60_tolerance=1e-6, tries=3)
    with pytest.raises(ValueError, match="room7: no room in 3 tries: 3 x rt60_s cannot be reached"):
        rooms.make_room(hopeless, "room7")


# --- the spec -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rt60": 0.3}, r"unknown key 'rt60'; did you mean 'rt60_s'\?"),
        (
            {"rt60_s": {"distribution": "uniform", "low": 1, "high": 0.5}},
            r"rt60_s.*: low 1.* above",
        ),
        ({"rt60_s": 20}, r"rt60_s: can draw 20 to 20 s"),
        ({"width_m": {"distribution": "normal", "mean": 4, "std": 1}}, r"width_m: can draw -inf"),
        ({"distance_m": 13}, r"distance_m: 13 m does not fit in the largest room"),
        ({"wall_margin_m": 1.2}, r"wall_margin_m: .* no place where height_m is 2\.3 m"),
        ({"max_image_order": 3}, r"max_image_order: 3 is too low .* at least 7"),
    ],
)
def test_a_wrong_spec_is_told_by_its_place(
    change: dict[str, object], message: str, tmp_path: Path, says: Says
) -> None:
    path = tmp_path / "r.yaml"
    values = load_rooms("simulated").model_dump(mode="json") | change
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SpecError, match=rf"r\.yaml: .*{message}"):
        load_rooms(path)
    assert (
        "r.yaml" in says(2, "corpora", "rooms", "--spec", path, "--out", tmp_path / "out")
        and not (tmp_path / "out").exists()
    )


def test_the_command_writes_the_shipped_spec_s_rooms_with_another_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, seed in (("a", []), ("b", ["--seed", "2"])):
        argv = ["corpora", "rooms", "--out", str(tmp_path / out), "--count", "2"]
        assert main([*argv, *seed]) == 0
        assert capsys.readouterr().out == f"{tmp_path / out}: 2 rooms files\n"
    both = [{row["rt60_s"] for row in records(tmp_path / out)} for out in ("a", "b")]
    assert len(both[0]) == len(both[1]) == 2 and not both[0] & both[1]


def test_a_full_disk_is_told_by_the_room_that_met_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(rooms, "write_record", full)
    monkeypatch.setattr(folder, "write_manifest", full)
    with pytest.raises(OSError, match=r"No space left.*room00000\.flac") as error:
        rooms.make_rooms(small(), tmp_path, 2)
    assert error.value.errno == errno.ENOSPC
    said = capsys.readouterr().err
    assert f"warning: {tmp_path / rooms.MANIFEST} is not up to date: " in said
