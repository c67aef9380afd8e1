"""What ``verify --deep`` holds of a dataset's description and manifests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.dataset.description import open_folder, reopen
from tests.pipeline.conftest import Says
from tests.sketches import make_all, manifest, sketch_job
from train.data.shards import read_dataset_info


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A whole dataset."""
    make_all(sketch_job(tmp_path / "out", samples=4))
    return tmp_path / "out"


def verified(out: Path) -> int:
    return main(["verify", str(out), "--deep"])


Described = dict[str, Any]


def change(out: Path, how: Callable[[Described], object]) -> None:
    path = out / "dataset.json"
    described = json.loads(path.read_text())
    how(described)
    path.write_text(json.dumps(described))


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


def test_a_changed_calibration_is_told(out: Path, says: Says) -> None:
    change(out, lambda told: told.update(teacher_calibration={"scale": 2.0}))
    said = says(1, "verify", out, "--deep")
    assert "dataset.json: was changed: teacher_calibration_sha256" in said
    with pytest.raises(ValueError, match=r"dataset\.json: teacher_calibration: was changed"):
        read_dataset_info(out)


def test_another_manifest_is_told(out: Path, says: Says) -> None:
    manifest("speech", 4).save(out / "manifests" / "speech.parquet")
    assert "speech.parquet: was changed: bring back" in says(1, "verify", out, "--deep")


CHANGES: dict[str, tuple[Callable[[Described], object], str]] = {
    "recipe": (lambda told: told["recipe"].update(seed=4), "recipe.seed: 4 there, 3"),
    "teacher": (lambda told: told.update(teacher="dnsmos"), 'teacher: "dnsmos" there'),
    "weights": (lambda told: told["identity"].update(teacher_sha256="b" * 64), "recipe_hash"),
    "format": (lambda told: told.update(format="1"), 'format: "1" there'),
    "corpora": (lambda told: told["corpora"].update(speech=3.5), "corpora.speech: 3.5 there"),
    "splits": (lambda told: told["splits"].update(speech="test"), "splits.speech"),
    "hash": (lambda told: told.update(recipe_hash="0" * 64), "recipe_hash"),
    "held out": (lambda told: told["identity"].update(assigned={"speech": {}}), "recipe_hash"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_description_is_told(what: str, out: Path, says: Says) -> None:
    how, said = CHANGES[what]
    change(out, how)
    told = says(1, "verify", out, "--deep")
    assert "dataset.json: was changed: " in told and said in told


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda told: told.update(recipe={"name": 1}), "recipe.name"),
        (lambda told: told["identity"].update(splits=3), "identity.splits"),
        (lambda told: told.update(samples=10**12), "samples"),
        (lambda told: told.update(samples="4"), "not a dataset description"),
        (lambda told: told.update(manifests_sha256=3), "not a dataset description"),
        (lambda told: told.update(teacher_calibration_sha256=None), "not a dataset description"),
    ],
)
def test_a_description_that_is_none_is_one_sentence(
    how: Callable[[Described], object], said: str, out: Path, says: Says
) -> None:
    change(out, how)
    error = says(2, "verify", out)
    assert error.startswith("error: ") and "dataset.json" in error and said in error
