"""Datasets grow, are merged, and are made again where something failed; no byte moves elsewhere."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_specs.cluster.needs import EVERY
from data_specs.io.errors import UserError
from data_specs.io.files import only_writer
from pipeline.dataset import attempts, prepare
from pipeline.dataset.description import WrongDataset, reopen
from pipeline.dataset.job import Job
from pipeline.dataset.merge import merge
from pipeline.dataset.shards import ShardError, read_ledger, verify_shard
from pipeline.engine import extend, run
from tests.pipeline.conftest import Says
from tests.sketches import make_all, manifests, sketch_job, tars

NOT_ASKED = {"device": "cpu", "teacher_device": "", "time_limit": 60.0, "corpus": []}


@pytest.fixture
def corpora(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """What a scan finds: set ``more_speech`` to files of a second folder. No teacher is loaded."""
    there = {"more_speech": 0}

    class Teacher:
        weights_sha256 = "a" * 64

    monkeypatch.setattr(prepare, "scan_all", lambda *args: manifests(**there))
    monkeypatch.setattr(prepare.label, "identify", lambda *_: Teacher())
    monkeypatch.setattr(prepare.label, "calibration", lambda teacher: None)
    yield there


def asked(samples: int, out: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(samples=samples, out=out, **NOT_ASKED)


def wrong(job: Job) -> list[str]:
    found = (
        verify_shard(job.out, shard, job.dataset_hash, job.shard_range(shard), deep=True)
        for shard in range(job.shard_count)
    )
    return [line for lines in found for line in lines]


# ---------------------------------------------------------------- extend


@pytest.mark.parametrize(
    ("before", "after", "made"),
    [(8, 18, [2, 3, 4]), (10, 16, [2, 3])],
    ids=["", "short last shard"],
)
def test_extended_is_made_at_once_with_the_larger_number(
    before: int, after: int, made: list[int], corpora: Any, tmp_path: Path
) -> None:
    make_all(sketch_job(tmp_path / "grown", before))
    job = extend.extended(tmp_path / "grown", asked(after))
    assert make_all(job) == made
    make_all(sketch_job(tmp_path / "at-once", after))
    assert tars(tmp_path / "grown") == tars(tmp_path / "at-once")
    assert reopen(tmp_path / "grown", {}).samples == after and wrong(job) == []


def test_extending_again_goes_on(corpora: Any, tmp_path: Path) -> None:
    make_all(sketch_job(tmp_path, 8))
    extend.extended(tmp_path, asked(16))  # and killed
    assert make_all(extend.extended(tmp_path, asked(16))) == [2, 3]


def test_a_dataset_does_not_shrink(corpora: Any, tmp_path: Path) -> None:
    make_all(sketch_job(tmp_path, 8))
    with pytest.raises(ValueError, match="has 8 already; --samples is how many"):
        extend.extended(tmp_path, asked(4))


def test_other_recordings_need_a_new_folder(corpora: Any, tmp_path: Path) -> None:
    make_all(sketch_job(tmp_path, 8))
    corpora["more_speech"] = 3
    with pytest.raises(WrongDataset, match=r"corpus speech is not the one.*--out NEW"):
        extend.extended(tmp_path, asked(16))


def test_a_new_version_keeps_the_old_shards_and_draws_from_all(
    corpora: Any, tmp_path: Path
) -> None:
    old = sketch_job(tmp_path / "one", 8)
    make_all(old)
    corpora["more_speech"] = 60
    job = extend.extended(tmp_path / "one", asked(16, tmp_path / "two"))
    assert job.dataset_hash != old.dataset_hash
    assert make_all(job) == [2, 3] and wrong(job) == []
    assert all(tars(tmp_path / "two")[name] == data for name, data in tars(old.out).items())
    told = json.loads((tmp_path / "two" / "dataset.json").read_text())
    assert told["derived_from"]["dataset_hash"] == old.dataset_hash
    assert told["derived_from"]["samples"] == 8 and told["samples"] == 16
    roots = {plan.speech.root for plan in job.plans(range(8, 16))}
    assert 1 in roots  # the new folder's recordings are used
    assert read_ledger(old.out).records[0].dataset_hash == old.dataset_hash  # untouched


def test_a_new_version_killed_midway_goes_on_and_grows(corpora: Any, tmp_path: Path) -> None:
    make_all(sketch_job(tmp_path / "one", 8))
    corpora["more_speech"] = 60
    job = extend.extended(tmp_path / "one", asked(12, tmp_path / "two"))
    (tmp_path / "two" / "shard-000001.json").unlink()
    job = extend.extended(tmp_path / "one", asked(12, tmp_path / "two"))
    assert make_all(job) == [2]
    assert make_all(extend.extended(tmp_path / "two", asked(16))) == [3]
    assert wrong(reopen(tmp_path / "two", {})) == []
    corpora["more_speech"] = 70
    third = extend.extended(tmp_path / "two", asked(20, tmp_path / "three"))
    assert third.identity["derived_from"]["derived_from"]["samples"] == 8


def test_lost_shards_of_the_earlier_version_are_not_made_of_new_recordings(
    corpora: Any, tmp_path: Path
) -> None:
    make_all(sketch_job(tmp_path / "old", 8))
    corpora["more_speech"] = 4
    make_all(extend.extended(tmp_path / "old", asked(16, tmp_path / "new")))
    before = tars(tmp_path / "new")
    for shard in (1, 3):
        (tmp_path / "new" / f"shard-{shard:06d}.json").unlink()
    with pytest.raises(
        WrongDataset, match=r"new: 1 shards of the version .*\(shard-000001\).*--out"
    ):
        extend.extended(tmp_path / "new", asked(20))
    make_all(extend.extended(tmp_path / "old", asked(16, tmp_path / "new")))
    assert tars(tmp_path / "new") == before
    assert make_all(extend.extended(tmp_path / "new", asked(20))) == [4]


def test_what_cannot_be_derived_from(corpora: Any, tmp_path: Path) -> None:
    short = sketch_job(tmp_path / "short", 6)
    make_all(short)
    corpora["more_speech"] = 3
    with pytest.raises(ValueError, match=r"its last shard is short.*--samples 8"):
        extend.extended(short.out, asked(16, tmp_path / "new"))
    unfinished = sketch_job(tmp_path / "unfinished", 8)
    with pytest.raises(ShardError, match="2 of 2 shards are not whole"):
        extend.extended(unfinished.out, asked(16, tmp_path / "new"))
    corpora["more_speech"] = 0
    with pytest.raises(ValueError, match="no corpus has anything new"):
        extend.extended(unfinished.out, asked(16, tmp_path / "new"))


def test_a_version_only_adds(corpora: Any, tmp_path: Path, monkeypatch: Any) -> None:
    make_all(sketch_job(tmp_path / "one", 8))
    fewer = manifests(5)
    fewer["noise"] = replace(fewer["noise"], table=fewer["noise"].table.slice(2))
    monkeypatch.setattr(prepare, "scan_all", lambda *args: fewer)
    with pytest.raises(ValueError, match=r"'noise': 2 recordings.*noise000\.wav.*only adds"):
        extend.extended(tmp_path / "one", asked(16, tmp_path / "two"))


def all_splits(job: Job) -> dict[str, dict[str, str]]:
    return {role: job.assigned(role) for role in job.recipe.sources.present()}


def few_are_held_out() -> dict[str, Any]:
    """Sources of which splits stay empty by hash alone, as those of small corpora do."""
    return {
        role: {"corpus": role, "holdout": {"validation": 0.06, "test": 0.06}}
        for role in ("speech", "noise", "rooms")
    }


@pytest.mark.parametrize("version", ["kept", "of before splits were kept"])
def test_no_speaker_changes_splits_in_any_version(
    version: str, corpora: Any, tmp_path: Path
) -> None:
    first = sketch_job(tmp_path / "0", 4, sources=few_are_held_out())
    if version == "kept":  # as ``prepare`` makes it
        for path in (tmp_path / "0").iterdir():
            path.unlink() if path.is_file() else None
        first = prepare.prepare(first.recipe, {}, tmp_path / "0", 4)
    assert ("assigned" in first.identity) == (version == "kept")
    make_all(first)
    splits = all_splits(first)
    assert all(set(found.values()) >= {"validation", "test"} for found in splits.values())
    for number, more in enumerate((15, 40, 41, 200), start=1):
        corpora["more_speech"] = more
        old, new = tmp_path / str(number - 1), tmp_path / str(number)
        make_all(extend.extended(old, asked(4 * number + 4, new)))
        make_all(extend.extended(new, asked(4 * number + 4)))  # in place: nothing to add
        now = all_splits(reopen(new, {}))
        assert {role: now[role] | splits[role] for role in now} == now
        assert len(now["speech"]) > len(splits["speech"])
        splits = now


def test_a_new_corpus_alone_would_have_moved_someone(corpora: Any, tmp_path: Path) -> None:
    # What the test above is worth: here, without what was kept, one speaker changes sides.
    first = sketch_job(tmp_path / "old", 4, sources=few_are_held_out())
    before = all_splits(first)["speech"]
    corpora["more_speech"] = 200
    fresh = prepare.prepare(first.recipe, {}, tmp_path / "new", 4)
    assert any(fresh.assigned("speech")[name] != split for name, split in before.items())


def test_a_dataset_is_not_asked_for_fewer_samples(corpora: Any, tmp_path: Path) -> None:
    job = sketch_job(tmp_path, 18)
    make_all(job)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"--samples 4: .* has 18 already; --samples is how many"):
        prepare.prepare(job.recipe, {}, tmp_path, 4)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert prepare.prepare(job.recipe, {}, tmp_path, 18).todo() == []


# ---------------------------------------------------------------- merge


def part(out: Path, shards: set[int], samples: int = 14, **changes: Any) -> Job:
    job = replace(sketch_job(out, samples, **changes), only=frozenset(shards))
    make_all(job)
    return job


def test_merged_parts_are_the_whole(tmp_path: Path, says: Says) -> None:
    part(tmp_path / "a", {0, 2})
    part(tmp_path / "b", {1, 3})
    says(0, "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    make_all(sketch_job(tmp_path / "at-once", 14))
    assert tars(tmp_path / "c") == tars(tmp_path / "at-once")
    assert wrong(reopen(tmp_path / "c", {})) == []
    same = [(tmp_path / name / "shard-000000.tar").stat().st_ino for name in ("a", "c")]
    assert same[0] == same[1]  # linked, not copied


def test_a_merge_is_the_only_writer_of_its_folder(tmp_path: Path) -> None:
    part(tmp_path / "a", {0})
    with only_writer(tmp_path / "c"), pytest.raises(UserError, match="another command writes"):
        merge([tmp_path / "a"], tmp_path / "c")
    assert tars(tmp_path / "c") == {}


def test_a_linked_shard_that_is_made_again_leaves_the_other_alone(tmp_path: Path) -> None:
    part(tmp_path / "a", {0})
    before = tars(tmp_path / "a")
    job = merge([tmp_path / "a"], tmp_path / "c")
    make_all(replace(job, again=frozenset({0}), only=frozenset({0})), frozenset({1}))
    assert tars(tmp_path / "a") == before != tars(tmp_path / "c")


def test_merging_says_what_is_missing(tmp_path: Path, says: Says) -> None:
    part(tmp_path / "a", {0, 2})
    assert "2 shards are whole in no input, such as shard-000001" in says(
        1, "merge", tmp_path / "a", "--out", tmp_path / "c"
    )


def test_ranges_of_different_length_give_the_longer_shard(tmp_path: Path) -> None:
    part(tmp_path / "short", {0, 1}, samples=6)
    part(tmp_path / "long", {1, 2}, samples=12)
    merge([tmp_path / "short", tmp_path / "long"], tmp_path / "c")
    make_all(sketch_job(tmp_path / "at-once", 12))
    assert tars(tmp_path / "c") == tars(tmp_path / "at-once")


def test_other_recipes_are_refused_by_field(tmp_path: Path, says: Says) -> None:
    part(tmp_path / "a", {0})
    part(tmp_path / "b", {1}, seed=99)
    command = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]
    assert "recipe.seed: 3 in the first, 99 here" in says(2, *command)
    assert not (tmp_path / "c").exists()


def test_two_contents_of_one_shard_are_refused(tmp_path: Path) -> None:
    part(tmp_path / "a", {0})
    make_all(replace(sketch_job(tmp_path / "b", 14), only=frozenset({0})), frozenset({2}))
    with pytest.raises(ShardError, match=r"shard-000000: .*a and .*b have different content"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_an_input_is_no_output(tmp_path: Path) -> None:
    part(tmp_path / "a", {0})
    with pytest.raises(ValueError, match="is one of the inputs"):
        merge([tmp_path / "a"], tmp_path / "a")


# ---------------------------------------------------------------- made again


def ended(**said: Any) -> attempts.Attempts:
    told = {"run": attempts.new_run(), "began": 0.0, "updated": 0.0, "engine": "ray"}
    return attempts.Attempts(**told, workers=1, shards=5, **said)


def test_only_what_failed_is_made_again(tmp_path: Path) -> None:
    job = sketch_job(tmp_path / "out", 18, max_dropped_share=0.5)
    make_all(replace(job, only=frozenset({0, 1, 2})), frozenset({5}))
    attempts.write_attempts(job.out, ended(failed={3: "GuardError: memory is short"}))
    again = attempts.again(job)
    assert again.todo() == [1, 3]  # a dropped sample, a failed attempt; shard 4 was never tried
    assert run.left_whole(again, EVERY, [1, 3]) == 2  # 0 and 2
    assert make_all(again) == [1, 3]
    assert attempts.again(job).todo() == []
    make_all(job)
    make_all(sketch_job(tmp_path / "undisturbed", 18))
    assert tars(tmp_path / "out") == tars(tmp_path / "undisturbed")


def test_what_a_killed_run_had_in_flight_is_made_again(tmp_path: Path) -> None:
    job = sketch_job(tmp_path, 20, max_dropped_share=0.5)
    make_all(replace(job, only=frozenset({0, 1, 2})), frozenset({5}))
    assert attempts.again(job).todo() == [1]
    (tmp_path / "shard-000001.json").unlink()  # making it again began, and its driver was killed
    assert attempts.again(job).todo() == [1]
    gone = ended(running={3: 0.0}, failed={0: "mended"})
    attempts.write_attempts(tmp_path, gone)
    assert attempts.again(job).todo() == [1, 3]  # 0 is whole, 4 was never begun
    attempts.write_attempts(tmp_path, gone.model_copy(update={"updated": time.time()}))
    assert attempts.again(job).todo() == [1]  # that driver is at work


def test_a_failure_that_another_run_made_up_for_is_none(tmp_path: Path) -> None:
    job = sketch_job(tmp_path, 8)
    attempts.write_attempts(job.out, ended(failed={1: "its worker died"}))
    make_all(job)
    assert attempts.again(job).todo() == []


def test_making_again_a_shard_that_now_fails_keeps_the_old_one(tmp_path: Path) -> None:
    job = sketch_job(tmp_path, 8, max_dropped_share=0.25)
    make_all(job, frozenset({5}))
    before = tars(tmp_path)
    with pytest.raises(RuntimeError, match="more than max_dropped_share allows"):
        make_all(attempts.again(job), frozenset({4, 5, 6}))
    assert tars(tmp_path) == before and job.todo() == []
