"""Selection against sorting, schedules against their formulas, magnitude by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from train.pruning.masks import Masks
from train.pruning.select import (
    remove_by_magnitude,
    remove_smallest,
    schedule,
    weights_at,
)

NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0, 2.0, 1e-45, 1.17549435e-38, 3.4028235e38, math.inf]),
    st.floats(min_value=0, width=32, allow_nan=False),
)


def expected(scores: dict, alive: dict, count: int) -> dict:
    """What a stable sort of everything would leave: by score, then tensor, then place."""
    flat = torch.cat([score.flatten() for score in scores.values()]).numpy()
    living = torch.cat([mask.flatten() for mask in alive.values()]).numpy()
    order = [place for place in np.argsort(flat, kind="stable") if living[place]]
    left = living.copy()
    left[order[:count]] = False
    sizes = [score.numel() for score in scores.values()]
    parts = torch.from_numpy(left).split(sizes)
    shapes = [score.shape for score in scores.values()]
    return {n: p.view(s) for n, p, s in zip(scores, parts, shapes, strict=True)}


@st.composite
def cases(draw):
    scores, alive = {}, {}
    for number in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 12))
        values = draw(st.lists(NUMBERS, min_size=size, max_size=size))
        living = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        scores[f"w{number}"] = torch.tensor(values, dtype=torch.float32)
        alive[f"w{number}"] = torch.tensor(living)
    count = sum(int(mask.sum()) for mask in alive.values())
    return scores, alive, draw(st.integers(0, count))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_selection_is_what_sorting_would_select(case):
    scores, alive, count = case
    kept = {name: mask.clone() for name, mask in alive.items()}
    remove_smallest(scores, kept, count)
    wanted = expected(scores, alive, count)
    assert all(torch.equal(kept[name], wanted[name]) for name in kept)
    assert Masks(alive).alive() - Masks(kept).alive() == count


def test_a_million_scores_with_many_ties():
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.rand(1000, 700, generator=generator).square(),
        "b": torch.randint(0, 5, (300_000,), generator=generator).float() / 10,
        "c": torch.zeros(100, 10, 3),
    }
    alive = {name: torch.rand(s.shape, generator=generator) < 0.9 for name, s in scores.items()}
    for count in (1, 5000, 400_000, sum(int(mask.sum()) for mask in alive.values())):
        kept = {name: mask.clone() for name, mask in alive.items()}
        remove_smallest(scores, kept, count)
        wanted = expected(scores, alive, count)
        assert all(torch.equal(kept[name], wanted[name]) for name in kept)


def test_scores_in_any_layout_and_minus_zero():
    score = torch.rand(4, 3, 3, 3).to(memory_format=torch.channels_last)
    masks = {"w": torch.ones(4, 3, 3, 3, dtype=torch.bool)}
    wanted = expected({"w": score.contiguous()}, masks, 50)
    remove_smallest({"w": score}, masks, 50)
    assert torch.equal(masks["w"], wanted["w"])
    masks = {"w": torch.ones(3, dtype=torch.bool)}
    remove_smallest({"w": torch.tensor([0.0, -0.0, 0.0])}, masks, 2)
    assert masks["w"].tolist() == [False, False, True]


def test_what_cannot_be_selected_is_refused_by_name_and_nothing_is_cleared():
    masks = {name: torch.ones(3, dtype=torch.bool) for name in ("good", "bad")}
    good = torch.tensor([1.0, 2.0, 3.0])
    for values, message in (
        ([1.0, math.nan, 0.0], "bad: a score is NaN"),
        ([1.0, -math.nan, 0.0], "bad: a score is NaN"),
        ([1.0, -2.0, 0.0], "bad: a score is -2, negative"),
    ):
        scores = {"good": good, "bad": torch.tensor(values)}
        with pytest.raises(ValueError, match=message):
            remove_smallest(scores, masks, 2)
    with pytest.raises(ValueError, match="7 of 6 living weights"):
        remove_smallest({"good": good, "bad": good}, masks, 7)
    with pytest.raises(ValueError, match="good: scores must be float32"):
        remove_smallest({"good": good.double()}, masks, 1)
    assert all(mask.all() for mask in masks.values())
    masks["bad"][1] = False  # a dead weight's score does not matter
    scores = {"good": good, "bad": torch.tensor([1.0, math.nan, 0.0])}
    remove_smallest(scores, masks, 1)
    assert masks["bad"].tolist() == [True, False, False]


# --- schedules ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**9), st.sampled_from([0.005, 0.01, 0.1, 0.29]))
def test_a_round_of_the_living_removes_the_floor_of_the_rate(total, rate):
    left = schedule(total, rate, "living", total // 10)
    assert left[0] == total
    assert left[-1] <= total // 10 < left[-2]
    for before, after in itertools.pairwise(left):
        assert before - after == max(1, before * round(1000 * rate) // 1000)


def test_the_papers_rounds():
    total = 478_000_000
    left = schedule(total, 0.005, "living", weights_at(7, total))
    assert len(left) - 1 == 531  # 0.995^531 = 0.0698
    for number, count in enumerate(left):  # a round is off by less than one weight, which shrinks
        assert abs(count - total * 0.995**number) <= 200
    assert left[247] / total == pytest.approx(0.29, abs=1e-4)
    start = schedule(total, 0.005, "start", weights_at(7, total))
    assert start == [total - 2_390_000 * number for number in range(187)]
    assert start[142] == 138_620_000  # 29 %


def test_counts_do_not_drift_and_every_schedule_ends():
    assert schedule(1001, 0.005, "start", 900) == [1001 - n * 1001 // 200 for n in range(22)]
    assert schedule(7, 0.005, "living", 3) == [7, 6, 5, 4, 3]
    assert schedule(10, 0.3, "start", 0) == [10, 7, 4, 1, 0]
    assert schedule(10, 0.3, "start", 10) == [10]
    assert weights_at(29, 100) == 29  # and not the 28 of 0.29 x 100 in floating point
    assert weights_at(7, 1000) == 70


# --- magnitude ------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2, bias=False)
        self.conv = nn.Conv2d(2, 3, 2, bias=False)


def test_magnitude_takes_the_smallest_of_every_matrix_and_whole_kernels():
    network = Tiny()
    with torch.no_grad():
        network.linear.weight.copy_(torch.tensor([[1.0, -9, 3, 4, 5], [-6, 7, 8, 2, 10]]) * 100)
        norms = torch.tensor([[3.0, 1.0], [5.0, 2.0], [4.0, 6.0]])
        network.conv.weight.copy_(norms[:, :, None, None] * torch.tensor([[0.5, -0.1], [0.2, 0.2]]))
    masks = Masks.full(network, ["linear.weight", "conv.weight"])
    remove_by_magnitude(network, masks, target=17)  # half of 34
    assert masks["linear.weight"].tolist() == [
        [False, True, False, False, False],
        [True, True, True, False, True],
    ]
    kernels = masks["conv.weight"]
    assert kernels[:, :, 0, 0].tolist() == [[False, False], [True, False], [True, True]]
    assert all((kernels == kernels[:, :, :1, :1]).flatten().tolist())
    assert masks.alive() == 5 + 12
    masks.apply_(network)
    remove_by_magnitude(network, masks, target=11)  # 3.2 of 10 weights, 1.9 of 6 kernels
    assert masks.alive() == 3 + 4
    assert masks["linear.weight"].nonzero().tolist() == [[0, 1], [1, 2], [1, 4]]
    assert masks["conv.weight"][2, 1].all()
    remove_by_magnitude(network, masks, target=0)
    assert masks.alive() == 0
