"""Kept scores, clips in common, means over sets, Table I."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.evaluation.common_clips import common_clips, entries_of
from train.evaluation.published import published_for, table1
from train.evaluation.records import ClipScore, SetResult
from train.evaluation.score_cache import ScoreCache
from train.evaluation.tables import means

KEY = ("w" * 64, "v", "zero", "c" * 64)


# --- cache ----------------------------------------------------------------------------------------


def test_scores_are_kept_between_runs_and_forgotten_with_fresh(tmp_path):
    path = tmp_path / "out" / "cache.jsonl"
    with ScoreCache(path) as cache:
        cache.put(KEY, {"a": 1.5, "b": 2.0})
        assert cache.get(KEY, ("a",)) == {"a": 1.5}
    again = ScoreCache(path)
    assert again.get(KEY, ("a", "b")) == {"a": 1.5, "b": 2.0}
    assert again.get(KEY, ("a", "c")) is None
    for place in range(4):
        other = tuple("x" if n == place else part for n, part in enumerate(KEY))
        assert again.get(other, ("a",)) is None
    with ScoreCache(path, fresh=True) as fresh:
        assert fresh.get(KEY, ("a",)) is None
    assert ScoreCache(path).get(KEY, ("a",)) is None


@given(cut=st.integers(0, 400))
def test_a_cut_file_keeps_its_whole_lines_and_goes_on(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cache") / "cache.jsonl"
    keys = [("w", "v", "zero", f"clip{n}") for n in range(4)]
    with ScoreCache(path) as cache:
        for number, key in enumerate(keys):
            cache.put(key, {"a": float(number)})
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole)
    lines = whole.decode().split("\n")
    last_is_whole = lines[-1].endswith("}}")
    kept = len(lines) - 1 + last_is_whole
    with ScoreCache(path) as cache:
        assert [cache.get(key, ("a",)) is not None for key in keys] == [n < kept for n in range(4)]
        cache.put(KEY, {"a": 9.0})
    assert ScoreCache(path).get(KEY, ("a",)) == {"a": 9.0}


def test_lines_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "cache.jsonl"
    good = {"weights": "w", "version": "v", "padding": "s", "clip": "c", "scores": {"a": 1}}
    lines = ["[]", "{}", "\u0000", json.dumps(good | {"scores": 3}), json.dumps(good)]
    path.write_text("\n".join(lines))
    assert ScoreCache(path).get(("w", "v", "s", "c"), ("a",)) == {"a": 1.0}


# --- clips in common ------------------------------------------------------------------------------


def rows_of(model, keys, padding="zero", **changes):
    return [
        ClipScore(model, "set", key, 3.0, 1.0 + n, padding, **changes) for n, key in enumerate(keys)
    ]


def compared(rows, keys):
    return common_clips(rows, keys, "rated", entries_of(rows, {}, set()))


def test_a_clip_that_one_model_lacks_is_left_out_for_all_and_named():
    rows = rows_of("a", "pqrst") + rows_of("b", "pqst")
    clips, notes = compared(rows, list("pqrst"))
    assert clips.keys == list("pqst")
    assert clips.scores["a"].tolist() == [1, 2, 4, 5] and clips.scores["b"].tolist() == [1, 2, 3, 4]
    assert len(notes) == 1 and "1 of 5 clips are left out" in notes[0] and notes[0].endswith(": r")


def test_a_model_that_lacks_most_clips_is_left_out_itself():
    rows = rows_of("a", "pqrst") + rows_of("b", "pq")
    clips, notes = compared(rows, list("pqrst"))
    assert clips.keys == list("pqrst") and list(clips.scores) == ["a"]
    assert "b scored 2 of 5 clips and is not compared" in notes[0]


def test_nothing_in_common():
    rows = rows_of("a", "pq") + rows_of("b", "rs")
    clips, notes = compared(rows, list("pqrs"))
    assert clips is None and "no clip that all models scored" in notes[-1]


def test_a_model_with_two_paddings_is_two_entries():
    rows = rows_of("a", "pq") + rows_of("a", "pq", "repeat") + rows_of("b", "pq", "own")
    clips, _ = compared(rows, ["p", "q"])
    assert list(clips.scores) == ["a (zero)", "a (repeat)", "b"]


def test_conditions_count_where_every_clip_has_one():
    rows = rows_of("a", "pqr", condition="c", system="s")
    assert compared(rows, list("pqr"))[0].unit == "condition"
    rows[1] = ClipScore("a", "set", "q", 3.0, 1.0, "zero", system="s")
    clips, _ = compared(rows, list("pqr"))
    assert clips.unit == "system" and clips.conditions == []


# --- means and Table I ----------------------------------------------------------------------------


def test_means_leave_out_what_is_not_defined_metric_by_metric():
    rows = [
        SetResult("m", "a", 10, 0.8, 0.7, 0.3, "zero", "rated", kendall=0.5, rmse_mapped=0.2),
        SetResult("m", "b", 30, 0.4, 0.3, None, "zero", "rated", kendall=0.1, rmse_mapped=0.6),
        SetResult("m", "c", 20, None, None, 0.6, "zero", "rated", "why"),
        SetResult("m", "a", 10, 0.9, 0.9, 0.1, "zero", "rated", level="condition"),
        SetResult("m", "s", 99, 0.1, 0.1, 0.5, "none", "shards"),
    ]
    (mean,) = means(rows)
    assert (mean["sets"], mean["undefined_sets"], mean["clips"]) == (2, 1, 40)
    assert mean["pcc_unweighted"] == pytest.approx(0.6) and mean["pcc_weighted"] == pytest.approx(
        0.5
    )
    assert mean["rmse_unweighted"] == pytest.approx(0.45)
    assert mean["rmse_weighted"] == pytest.approx((10 * 0.3 + 20 * 0.6) / 30)
    assert mean["kendall_weighted"] == pytest.approx(0.2)


def test_table_1_is_the_papers():
    rows, clips = table1()
    assert len(rows) == 11 and len(clips) == 16 and sum(clips.values()) == 46_050
    (student,) = [row for row in rows if row.model == "XLS-R-DistillMOS v7"]
    assert (student.parameters, student.weighted, student.unweighted) == (4_300_000, 0.76, 0.73)
    # The means are the paper's own, from more digits than it prints: they agree to rounding.
    for row in rows:
        known = {name: pcc for name, pcc in row.pcc.items() if pcc is not None}
        by_clips = sum(clips[name] * pcc for name, pcc in known.items()) / sum(
            clips[name] for name in known
        )
        assert abs(by_clips - row.weighted) < 0.02, row.model
        assert abs(sum(known.values()) / len(known) - row.unweighted) < 0.02, row.model


def test_a_set_is_known_by_any_of_its_names():
    by_name = {row.model: pcc for row, pcc in published_for("nisqa_p501")}
    assert by_name["XLS-R-DistillMOS v7"] == 0.90 and len(by_name) == 11
    for name in ("NISQA P.501", "NISQA_P501"):
        assert published_for(name) == published_for("nisqa_p501")
    assert len(published_for("dns3_fb")) == 10  # one cell of Table I is empty
    assert published_for("p835ref_nb") == []
