"""Shards: whole or not there; what is wrong is told by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.audio import encode_flac, pcm_sha256, to_pcm
from pipeline.dataset.shards import (
    Row,
    TooManyDropped,
    commit,
    one_shard,
    samples,
    verify_shard,
)
from tests.conftest import ROOT, talk

HASH = "a" * 64


def row(index: int, **changes: object) -> Row:
    pcm = to_pcm(talk(7.68, index))
    record = {
        "key": f"{index:09d}",
        "mos": 3.0,
        "logit": 0.0,
        "teacher": "distillmos",
        "teacher_sha256": "b" * 64,
        "pcm_sha256": pcm_sha256(pcm),
        "plan": {"index": index},
    } | changes
    return Row(f"{index:09d}", encode_flac(pcm), json.dumps(record).encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    commit(tmp_path, 0, [row(i) for i in range(3)], HASH, 0.0)
    return tmp_path


def test_a_committed_shard_is_whole_and_deeply_right(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == ["shard-000000.json", "shard-000000.tar"]
    assert not one_shard(folder, 0).problem(0, HASH, 3)
    assert verify_shard(folder, 0, HASH, range(3), deep=True) == []


def test_the_tars_bytes_follow_from_the_samples_alone(folder: Path) -> None:
    """No time, owner or mode of a machine: a tar as Python writes it by default."""
    assert (folder / "shard-000000.tar").read_bytes() == tar_of(members_of(folder))


@pytest.mark.parametrize(
    ("hash_", "planned"), [("c" * 64, 3), (HASH, 4)], ids=["another dataset", "another length"]
)
def test_what_is_not_ours_is_not_whole(folder: Path, hash_: str, planned: int) -> None:
    assert one_shard(folder, 0).problem(0, hash_, planned)


def test_a_truncated_tar_is_not_whole_and_is_told(folder: Path) -> None:
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])
    assert one_shard(folder, 0).problem(0, HASH, 3)
    (line,) = verify_shard(folder, 0, HASH, range(3))
    assert str(tar) in line and "truncated" in line


def test_a_flipped_byte_is_told(folder: Path) -> None:
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[5_000] ^= 0xFF
    tar.write_bytes(data)
    lines = verify_shard(folder, 0, HASH, range(3), deep=True)
    assert any("corrupted" in line for line in lines)
    assert any("000000000.flac" in line for line in lines)


def test_a_missing_record_or_tar_is_told(folder: Path) -> None:
    record = folder / "shard-000000.json"
    kept = record.read_bytes()
    record.unlink()
    assert "no record" in verify_shard(folder, 0, HASH, range(3))[0]
    record.write_bytes(b"{not json")
    assert "not a shard record" in verify_shard(folder, 0, HASH, range(3))[0]
    record.write_bytes(kept)
    (folder / "shard-000000.tar").unlink()
    assert "missing" in verify_shard(folder, 0, HASH, range(3))[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [(range(4), "1 samples missing, neither made nor dropped"), (range(2), "1 samples not part")],
)
def test_what_the_plan_does_not_say_is_told(folder: Path, rows: range, said: str) -> None:
    assert any(said in line for line in verify_shard(folder, 0, HASH, rows))


Members = dict[str, bytes]


def members_of(folder: Path) -> Members:
    members = {}
    for key, flac, record in samples(folder / "shard-000000.tar"):
        members |= {f"{key}.flac": flac, f"{key}.json": record}
    return members


def tar_of(members: Members) -> bytes:
    """As Python writes it by default."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def rewrite(folder: Path, change: Callable[[Members], Members]) -> None:
    """Replace the shard by one with changed members, and a record that fits it."""
    data = tar_of(change(members_of(folder)))
    (folder / "shard-000000.tar").write_bytes(data)
    path = folder / "shard-000000.json"
    record = json.loads(path.read_bytes())
    record["tar_bytes"] = len(data)
    record["tar_sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(record))


def second(change: Callable[[dict[str, Any]], object]) -> Callable[[Members], Members]:
    """Change the second sample's record."""

    def changed(members: Members) -> Members:
        record = json.loads(members["000000001.json"])
        change(record)
        return members | {"000000001.json": json.dumps(record).encode()}

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (second(lambda r: r.pop("mos")), "000000001.json: field 'mos'"),
        (second(lambda r: r.update(mos=float("nan"))), "000000001.json: field 'mos'"),
        (second(lambda r: r.update(key="000000002")), "is the record of sample 000000002"),
        (
            lambda members: {n: c for n, c in members.items() if n != "000000001.flac"},
            "member 000000001.flac is missing",
        ),
    ],
)
def test_a_sample_without_label_or_audio_is_told(folder: Path, change: Any, said: str) -> None:
    rewrite(folder, change)
    assert any(said in line for line in verify_shard(folder, 0, HASH, range(3)))


def test_too_many_drops_are_not_committed(tmp_path: Path) -> None:
    rows = [row(0), Row("000000001", None, None, "silent", "x.wav: -90 dBFS")]
    with pytest.raises(TooManyDropped, match=r"1 of 2 samples dropped \(1 silent\).*x\.wav"):
        commit(tmp_path, 0, rows, HASH, 0.4)
    assert os.listdir(tmp_path) == []
    record = commit(tmp_path, 0, rows, HASH, 0.5)
    assert (record.samples, record.planned) == (1, 2)
    assert record.dropped[0]["reason"] == "silent"
    assert verify_shard(tmp_path, 0, HASH, range(2), deep=True) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    # A real write that the kernel refuses, as a full disk does: no file may grow past 50 kB.
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))
from pathlib import Path
from tests.pipeline.test_shards import row, HASH
from pipeline.dataset.shards import commit
try:
    commit(Path({str(tmp_path)!r}), 0, [row(i) for i in range(3)], HASH, 0.0)
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "refused: [Errno 27] File too large" in done.stdout
    assert os.listdir(tmp_path) == []


def test_an_error_midway_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = Row("000000001", "not bytes", b"{}")  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError, AssertionError)):
        commit(tmp_path, 0, [row(0), bad], HASH, 0.0)
    assert os.listdir(tmp_path) == []


def test_numpy_is_not_needed_to_hash_pcm_the_same_on_big_endian() -> None:
    pcm = np.arange(10, dtype=">i2")
    assert pcm_sha256(pcm) == pcm_sha256(pcm.astype("<i2"))
