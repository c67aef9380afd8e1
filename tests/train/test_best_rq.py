"""BEST-RQ: codes that the seed fixes, masks, what is learned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from data_specs.io.errors import UserError
from train.finetune.tasks.self_supervised import SelfSupervised
from train.models.best_rq import CODES, MASKED, STACK, BestRq, draw_masks
from train.models.encoders.conformer import Conformer, ConformerConfig

TINY = ConformerConfig(width=8, layers=1, heads=2, hidden=8, channels=2, mels=8, dropout=0.0)
GOLDEN = [5650, 1505, 5172, 2265, 1192, 5710]
"""Codes of seed 5."""


def mels() -> Tensor:
    """The same on every machine."""
    numbers = torch.arange(2 * 24 * TINY.mels).view(2, 24, TINY.mels)
    return (numbers * numbers % 1009) / 100


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_seed_alone_fixes_the_codes() -> None:
    ours = BestRq(8, 8, seed=5)
    torch.manual_seed(99)
    again, other = BestRq(8, 8, seed=5), BestRq(8, 8, seed=6)
    for name, tensor in ours.named_buffers():
        assert torch.equal(tensor, dict(again.named_buffers())[name])
        assert not torch.equal(tensor, dict(other.named_buffers())[name])
    lengths_B = torch.tensor([24, 24])
    assert ours.targets(mels(), lengths_B)[0].tolist() == GOLDEN
    assert not any(p.requires_grad for p in ours.buffers())
    assert torch.allclose(ours.codes_NC.norm(dim=1), torch.ones(CODES), atol=1e-6)


def test_codes_are_the_nearest_ones_of_normalised_stacks() -> None:
    made, mels_BMK = BestRq(8, 8, seed=5), mels()
    found_BS = made.targets(mels_BMK, torch.tensor([24, 13]))
    for number, frames in enumerate((24, 13)):
        clip_MK = mels_BMK[number, :frames]
        normal_MK = (clip_MK - clip_MK.mean(0)) / clip_MK.std(0, correction=0)
        for place in range(frames // STACK):
            stack_K = normal_MK[place * STACK : (place + 1) * STACK].flatten()
            projected_C = stack_K @ made.projection_KC
            apart_N = (made.codes_NC - projected_C / projected_C.norm()).norm(dim=1)
            assert int(apart_N.argmin()) == found_BS[number, place]
    # Neither level nor what lies behind a clip matters.
    moved_BMK = mels_BMK + 4.0
    moved_BMK[1, 13:] = 100.0
    moved_BS = made.targets(moved_BMK, torch.tensor([24, 13]))
    assert torch.equal(moved_BS[0], found_BS[0]) and torch.equal(moved_BS[1, :3], found_BS[1, :3])


def test_a_fixed_share_of_each_clip_is_masked() -> None:
    masked_BS = draw_masks(torch.tensor([50, 20, 1]), 50, draw())
    assert masked_BS.sum(1).tolist() == [50 * MASKED, 20 * MASKED, 1]
    assert not masked_BS[1, 20:].any() and not masked_BS[2, 1:].any()
    assert not torch.equal(masked_BS, draw_masks(torch.tensor([50, 20, 1]), 50, draw(1)))


def test_masks_are_filled_with_noise_and_the_rest_is_heard() -> None:
    made, frames_B = BestRq(8, 8, seed=5), torch.tensor([50, 31])
    mels_BMK = torch.randn(2, 50, 8, generator=draw(3))
    found = made.mask(mels_BMK, frames_B, draw(7))
    assert torch.equal(found.masked_BS, draw_masks(frames_B // STACK, 12, draw(7)))
    assert torch.equal(found.codes_BS, made.targets(mels_BMK, frames_B))
    hidden_BM = functional.pad(found.masked_BS.repeat_interleave(STACK, 1), (0, 2))
    assert torch.equal((found.mels_BMK == mels_BMK).all(-1), ~hidden_BM)
    filled_NK = found.mels_BMK[hidden_BM]
    assert filled_NK.std() == pytest.approx(0.1, rel=0.2) and filled_NK.mean().abs() < 0.02


def test_what_repeats_is_learned() -> None:
    torch.manual_seed(0)
    encoder = Conformer(TINY)
    task = SelfSupervised.new(encoder, [])
    tone_1T = torch.sin(torch.arange(16_000) * 0.3)[None] * (torch.arange(16_000) // 1600 % 2)
    lengths_B = torch.tensor([16_000])
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=0.02)
    losses = []
    for _ in range(30):
        inputs = task.inputs(encoder, tone_1T, lengths_B)
        loss = task.loss(encoder(tone_1T, lengths_B, **inputs), [])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    # At first all of 8192 codes are about as likely.
    assert losses[0] == pytest.approx(math.log(CODES), abs=0.5)
    assert losses[-1] < 0.6 * losses[0]


def test_what_a_clip_is_judged_by_is_always_masked_alike() -> None:
    encoder, waves_BT = Conformer(TINY).eval(), 0.1 * torch.randn(2, 8000, generator=draw(3))
    task, lengths_B = SelfSupervised.new(encoder, []).eval(), torch.tensor([8000, 5000])

    def judged() -> list[Any]:
        inputs = task.inputs(encoder, waves_BT, lengths_B)
        return task.predict(encoder(waves_BT, lengths_B, **inputs))

    assert judged() == judged()
    assert [count for _, _, count in judged()] == [round(12 * MASKED), round(7 * MASKED)]


def test_states_must_be_as_long_as_codes() -> None:
    with pytest.raises(UserError, match="a state for 4 frames"):
        SelfSupervised.new(Conformer(TINY.model_copy(update={"factor": 8})), [])
