"""Plans: pure, reproducible, independent of everything but their own names, and as frequent as the
recipe says."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_specs.corpus import find_corpus
from data_specs.recipe import Holdout, Recipe, load_recipe
from data_specs.strict import digest
from pipeline.corpora.manifest import CorpusError, exceptions, scan, split_again, split_of
from pipeline.render.plan import Tables, make_table, plan_block, plan_range
from pipeline.render.render import render_group
from tests.conftest import small_recipe


def tables_of(recipe: Recipe, corpora: dict[str, list[Path]], split: str = "all") -> Tables:
    return {
        role: make_table(
            scan(role, find_corpus(role, "test"), corpora[role]),
            source,
            role,
            split,
        )
        for role, source in recipe.sources.present().items()
    }


@pytest.fixture(scope="module")
def tables(corpora: dict[str, list[Path]]) -> Tables:
    return tables_of(small_recipe(), corpora)


def dumps(recipe: Recipe, tables: Tables, start: int, stop: int) -> list[dict]:
    return [plan.model_dump(mode="json") for plan in plan_range(recipe, tables, start, stop)]


def test_a_golden_plan(tables: Tables) -> None:
    # Changes only with PLAN_VERSION: whoever changes it tells every user to make their data again.
    assert digest(dumps(small_recipe(), tables, 1000, 1003))[:12] == GOLDEN


GOLDEN = "f9731b182b94"


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 10**9), count=st.integers(1, 40), cut=st.integers(0, 40))
def test_a_plan_does_not_depend_on_the_range_it_is_drawn_in(
    tables: Tables, start: int, count: int, cut: int
) -> None:
    recipe = small_recipe()
    cut = min(cut, count)
    whole = dumps(recipe, tables, start, start + count)
    parts = dumps(recipe, tables, start, start + cut) + dumps(
        recipe, tables, start + cut, start + count
    )
    assert whole == parts


def test_another_stage_moves_no_other_draw(tables: Tables) -> None:
    recipe = small_recipe()
    fewer = recipe.model_copy(update={"stages": recipe.stages[1:], "speech_stages": ()})
    for full, part in zip(dumps(recipe, tables, 0, 200), dumps(fewer, tables, 0, 200), strict=True):
        kept = [s for s in full["steps"] if s["stage"] not in ("enhance", "colour")]
        assert part["steps"] == kept
        assert {k: part[k] for k in ("speech", "noise", "room", "level_dbfs")} == {
            k: full[k] for k in ("speech", "noise", "room", "level_dbfs")
        }


def test_other_seeds_give_other_plans(tables: Tables) -> None:
    assert dumps(small_recipe(seed=1), tables, 0, 5) != dumps(small_recipe(seed=2), tables, 0, 5)


COUNT = 200_000


def within(hits: float, share: float, count: int = COUNT) -> bool:
    return abs(hits / count - share) <= 3 * math.sqrt(share * (1 - share) / count)


def test_every_decision_is_as_frequent_as_the_recipe_says(tables: Tables) -> None:
    # A fixed seed: of 370 right decisions one is further away than 3 standard errors.
    recipe = small_recipe(seed=11)
    block = plan_block(recipe, tables, 0, COUNT)
    assert within((block["room.file"] >= 0).sum(), 0.33)
    assert within((block["noise.file"] >= 0).sum(), 0.67)
    for stage in recipe.all_stages():
        weights = np.array([option.weight for option in stage.choices])
        for i, share in enumerate(stage.probability * weights / weights.sum()):
            assert within((block[f"stage.{stage.stage}"] == i).sum(), share), stage.stage


def test_drawn_values_have_the_recipes_distribution(tables: Tables) -> None:
    block = plan_block(small_recipe(), tables, 0, COUNT)
    snr_db, level_dbfs = block["noise.snr_db"], block["level_dbfs"]
    assert abs(snr_db.mean() - 10) < 3 * 4 / math.sqrt(COUNT)
    assert abs(snr_db.std() - 4) < 3 * 4 / math.sqrt(2 * COUNT)
    assert (level_dbfs.min(), level_dbfs.max()) == (
        pytest.approx(-35, abs=0.01),
        pytest.approx(-15, abs=0.01),
    )
    bitrate = block["stage.codec.opus.bitrate_bps"]
    assert abs(np.log(bitrate).mean() - (math.log(6000) + math.log(64000)) / 2) < 0.01
    assert (bitrate == np.rint(bitrate)).all()


def test_speech_is_drawn_by_its_length_and_within_the_file(tables: Tables) -> None:
    block = plan_block(small_recipe(), tables, 0, COUNT)
    lengths = tables["speech"].samples
    for i, share in enumerate(lengths / lengths.sum()):
        assert within((block["speech.file"] == i).sum(), share)
    needed = np.ceil(122_880 * block["speed"])
    last = block["speech.start_sample"] + needed
    assert (last <= np.maximum(lengths[block["speech.file"]], needed)).all()
    assert block["speech.start_sample"].min() == 0


def test_splits_share_no_speaker_noise_or_room(corpora: dict[str, list[Path]]) -> None:
    recipe = small_recipe()
    seen: Counter[tuple[str, str]] = Counter()
    for split in ("train", "validation", "test"):
        for role, table in tables_of(recipe, corpora, split).items():
            seen.update({(role, name) for name in table.path})
    assert set(seen.values()) == {1}
    assert len(seen) == 8 + 6 + 6


SHARES = st.floats(0.01, 0.45)
NAMES = st.text(min_size=1)


@settings(max_examples=100, deadline=None)
@given(names=st.sets(NAMES, min_size=3, max_size=12), share=SHARES)
def test_every_split_of_a_new_corpus_has_someone(names: set[str], share: float) -> None:
    split = split_of(sorted(names), Holdout(validation=share, test=share))
    assert set(split.values()) == {"train", "validation", "test"}


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.sets(NAMES, max_size=8), min_size=1, max_size=6),
    validation=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
)
def test_nobody_ever_changes_splits_however_a_corpus_grows(
    steps: list[set[str]], validation: float, test: float
) -> None:
    holdout = Holdout(validation=validation, test=test)
    names: set[str] = set()
    before: dict[str, str] = {}
    for step in steps:
        names |= step
        grown = split_of(sorted(names), holdout, before)
        assert grown.keys() == names
        assert {name: grown[name] for name in before} == before
        # What a dataset keeps is enough to have the same again.
        assert split_again(sorted(names), holdout, exceptions(grown, holdout)) == grown
        before = grown


def test_few_groups_are_kept_by_name() -> None:
    # Three that fill splits at most: the rest of a million follows from their hashes.
    split = split_of([f"speaker{i}" for i in range(10_000)], Holdout(validation=0.05, test=0.05))
    assert exceptions(split, Holdout(validation=0.05, test=0.05)) == {}
    few = Holdout(validation=0.001, test=0.001)
    assert len(exceptions(split_of(["a", "b", "c", "d"], few), few)) == 2


def test_an_empty_split_is_told(corpora: dict[str, list[Path]]) -> None:
    recipe = small_recipe(
        sources={
            role: {"corpus": role, "holdout": {"validation": 0.2, "test": 0}}
            for role in ("speech", "noise", "rooms")
        }
    )
    with pytest.raises(CorpusError, match=r"no speech file of corpus 'speech' is in split 'test'"):
        tables_of(recipe, corpora, "test")


PAPER_COUNT = 20_000


@pytest.fixture(scope="module")
def paper_block(tables: Tables) -> dict[str, np.ndarray]:
    return plan_block(load_recipe("paper"), tables | {"voices": tables["speech"]}, 0, PAPER_COUNT)


def test_the_papers_plans_have_the_papers_shares(paper_block: dict[str, np.ndarray]) -> None:
    # Section IV-B. Shares of the 85 % that are degraded; the fixed seed is the recipe's own.
    degraded = ~paper_block["voice"]
    count = int(degraded.sum())
    assert within((~degraded).sum(), 0.15, PAPER_COUNT)
    assert within((paper_block["room.file"] >= 0).sum(), 0.33, count)
    assert within((paper_block["noise.file"] >= 0).sum(), 0.67, count)
    for i in range(5):
        assert within((paper_block["stage.enhance"] == i).sum(), 0.2, count)
    assert within((paper_block["stage.vocoder"] >= 0).sum(), 0.33, count)
    assert within((paper_block["stage.codec"] >= 0).sum(), 0.5, count)
    for stage in ("room.file", "noise.file", "stage.enhance", "stage.vocoder", "stage.codec"):
        assert (paper_block[stage][~degraded] == -1).all()  # voices stay as they are


def test_the_papers_snr_is_what_is_rendered(
    paper_block: dict[str, np.ndarray], corpora: dict[str, list[Path]], tables: Tables
) -> None:
    drawn = paper_block["noise.snr_db"]
    assert abs(drawn.mean() - 10) < 3 * math.sqrt(10 / PAPER_COUNT)
    assert abs(drawn.std() - math.sqrt(10)) < 3 * math.sqrt(10 / (2 * PAPER_COUNT))
    noise = load_recipe("paper").noise
    recipe = small_recipe(stages=(), speech_stages=(), room={"probability": 0}, noise=noise)
    noisy = [plan for plan in plan_range(recipe, tables, 0, 120) if plan.noise]
    clean = [plan.model_copy(update={"noise": None}) for plan in noisy]
    error_db = [
        measured_snr_db(with_noise.pcm, without.pcm) - plan.noise.snr_db
        for plan, with_noise, without in zip(
            noisy, render_group(noisy, corpora), render_group(clean, corpora), strict=True
        )
    ]
    assert abs(np.mean(error_db)) < 0.1  # of the stated 10 +- 0.3
    assert np.std(error_db) < 0.5


def measured_snr_db(noisy: np.ndarray, clean: np.ndarray) -> float:
    """Speech against what is left of the mixture without it, in frames where someone speaks."""
    noisy, clean = noisy.astype(float), clean.astype(float)
    speech = clean * (noisy @ clean) / (clean @ clean)
    return active_db(speech) - active_db(noisy - speech)


def active_db(wave: np.ndarray, frame: int = 320) -> float:
    power = (wave[: len(wave) // frame * frame].reshape(-1, frame) ** 2).mean(axis=1)
    return float(10 * np.log10(power[power > power.max() * 1e-4].mean()))
