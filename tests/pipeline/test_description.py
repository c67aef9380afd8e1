"""What ``verify --deep`` holds of a dataset's description and manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.dataset.description import open_folder, reopen
from pipeline.dataset.shards import ShardError
from tests.sketches import make_all, sketch_job
from train.data.shards import read_dataset_info


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A whole dataset."""
    make_all(sketch_job(tmp_path / "out", samples=4))
    return tmp_path / "out"


def verified(out: Path) -> int:
    return main(["verify", str(out), "--deep"])


def change(out: Path, **fields: Any) -> None:
    path = out / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_flipped_bit_of_a_manifest_is_told(out: Path, share: float) -> None:
    assert verified(out) == 0
    path = out / "manifests" / "speech.parquet"
    flip(path, int(share * path.stat().st_size))
    assert verified(out) in (1, 2)
    with pytest.raises(ValueError, match=r"speech\.parquet"):
        reopen(out, {})


def test_a_manifest_that_was_changed_is_written_again(out: Path) -> None:
    path = out / "manifests" / "speech.parquet"
    right = path.read_bytes()
    flip(path, len(right) // 2)
    open_folder(sketch_job(out, samples=4))
    assert path.read_bytes() == right and verified(out) == 0


def test_a_changed_calibration_is_told(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(out, teacher_calibration={"scale": 2.0})
    assert verified(out) == 1
    assert "dataset.json: was changed: teacher_calibration_sha256" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"dataset\.json: teacher_calibration: was changed"):
        read_dataset_info(out)


def test_a_dataset_of_before_there_were_these_hashes_is_whole(out: Path) -> None:
    path = out / "dataset.json"
    described = json.loads(path.read_text())
    for name in ("manifests_sha256", "teacher_calibration_sha256"):
        described.pop(name)
    path.write_text(json.dumps(described))
    assert verified(out) == 0 and reopen(out, {}).samples == 4


@pytest.mark.parametrize("fields", [{"manifests_sha256": 3}, {"teacher_calibration_sha256": None}])
def test_hashes_that_are_none_are_no_description(out: Path, fields: dict[str, Any]) -> None:
    change(out, **fields)
    with pytest.raises(ShardError, match="not a dataset description"):
        reopen(out, {})
