"""The conformer: lengths, streaming, units that go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.sample import CROP_SAMPLES
from tests.tolerance import rounding
from train.models.encoders.conformer import Conformer, ConformerConfig, conformer_macs
from train.models.features import HOP_SAMPLES, MEL_FFT, log_mels
from train.pruning.structured import dead_units, remove_units
from train.pruning.units import layout_of

TINY = ConformerConfig(width=16, layers=2, heads=4, hidden=24, channels=4, mels=16, kernel=5)
CHUNK = 8
"""States of 40 ms: 320 ms."""

ROUNDING = rounding(256, magnitude=4, layers=20)
"""States are layer norms' (within 4); 10 sums of up to 256 products a layer: 1e-4."""


def conformer(seed: int = 0, **changes: object) -> Conformer:
    torch.manual_seed(seed)
    made = Conformer(TINY.model_copy(update=changes)).eval()
    for name, tensor in made.state_dict().items():  # as after training: nothing is zero or one
        if "norm" in name and tensor.is_floating_point():
            tensor.add_(0.2 * torch.rand_like(tensor))
        if "bias_" in name:
            tensor.normal_()
    return made


def noise(samples: int, clips: int = 1) -> Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(7))


def all_states(made: Conformer, waves_BT: Tensor, lengths: list[int] | None = None) -> Tensor:
    lengths_B = torch.tensor(lengths or [waves_BT.shape[1]] * len(waves_BT))
    with torch.inference_mode():
        return torch.stack(made(waves_BT, lengths_B).layers)


def test_log_mels_are_those_of_a_tone_and_end_where_they_say() -> None:
    time_T = torch.arange(16_000) / 16_000
    mels_FK = log_mels(torch.sin(2 * math.pi * 1000 * time_T)[None])[0]
    assert mels_FK.shape == (100, 80)
    assert set(mels_FK[10:].argmax(1).tolist()) == {26}  # 80 bands: 45.25 Slaney mel, of them 15
    wave_1T = noise(1600)
    moved_1T = wave_1T.clone()
    moved_1T[:, 5 * HOP_SAMPLES :] += 1
    same_F = (log_mels(wave_1T) == log_mels(moved_1T))[0].all(dim=1)
    assert same_F.tolist() == [True] * 5 + [False] * 5
    assert MEL_FFT % 2 == 0 and log_mels(torch.zeros(1, 160)).max() == pytest.approx(math.log(1e-6))


@pytest.mark.parametrize("chunk", [0, CHUNK])
def test_a_clip_does_not_depend_on_its_neighbours(chunk: int) -> None:
    made = conformer(chunk=chunk)
    waves_BT = noise(9000, clips=2)
    with torch.inference_mode():
        both = made(waves_BT, torch.tensor([9000, 5000]))
        alone = made(waves_BT[1:, :5000], torch.tensor([5000]))
    assert both.lengths_B.tolist() == [14, 8] and alone.lengths_B.tolist() == [8]
    for many_BFD, one_BFD in zip(both.layers, alone.layers, strict=True):
        assert torch.allclose(many_BFD[1, :8], one_BFD[0], rtol=0, atol=ROUNDING)


def test_a_stream_does_not_hear_what_is_behind_its_chunk() -> None:
    made = conformer(chunk=CHUNK)
    samples = CHUNK * TINY.factor * HOP_SAMPLES  # of a chunk
    wave_1T = noise(4 * samples)
    moved_1T = wave_1T.clone()
    moved_1T[:, 2 * samples :] = noise(2 * samples) + 0.5
    apart_LF = (all_states(made, wave_1T) - all_states(made, moved_1T)).abs().amax((1, 3))
    assert apart_LF[:, : 2 * CHUNK].max() == 0
    assert apart_LF[:, 2 * CHUNK :].min() > 1e-3
    # Nor does it matter whether what is behind is there: chunk by chunk gives the same.
    short = all_states(made, wave_1T[:, : 2 * samples])
    whole = all_states(made, wave_1T)[:, :, : 2 * CHUNK]
    assert torch.allclose(short, whole, rtol=0, atol=ROUNDING)


def test_a_chunk_is_heard_whole_and_without_chunks_all_is() -> None:
    samples = CHUNK * TINY.factor * HOP_SAMPLES
    wave_1T = noise(2 * samples)
    moved_1T = wave_1T.clone()
    moved_1T[:, samples - 160 : samples] *= 2  # the end of the first chunk
    streaming, whole = conformer(chunk=CHUNK), conformer()
    apart_F = (all_states(streaming, wave_1T) - all_states(streaming, moved_1T))[2, 0].abs().amax(1)
    assert apart_F[0] > 0
    moved_1T = wave_1T.clone()
    moved_1T[:, -160:] *= 2
    assert (all_states(whole, wave_1T) - all_states(whole, moved_1T))[2, 0, 0].abs().max() > 0


def test_multiply_adds_are_those_that_pytorch_counts() -> None:
    kept = {"layers.0.heads": 2, "layers.1.feedforward2": 5, "layers.1.channels": 7}
    for config in (TINY, TINY.model_copy(update={"kept": kept, "factor": 8})):
        counted = Conformer(config).eval().sizes()["macs_per_second"] * Conformer.counted_s
        assert counted == pytest.approx(conformer_macs(config, CROP_SAMPLES), abs=8)


@pytest.mark.parametrize("chunk", [0, CHUNK])
def test_units_that_are_gated_by_zero_are_gone(chunk: int) -> None:
    made, waves_BT = conformer(chunk=chunk), noise(6000)
    layout = layout_of(made)
    assert len(layout.groups) == 2 * 4
    generator = torch.Generator().manual_seed(1)
    units = {g.name: torch.rand(g.count, generator=generator) < 0.5 for g in layout.groups}
    state = made.state_dict()
    for group in layout.groups:
        units[group.name][0] = False
        for part in group.gates:
            part.clear(state, units[group.name].nonzero().flatten())
    smaller = remove_units(made, units)
    left = {name: int((~gone_U).sum()) for name, gone_U in units.items()}
    assert smaller.config.kept == left and layout_of(smaller).counts == left
    assert layout_of(smaller).macs(left) == layout.macs(left) < layout.macs(layout.counts)
    gated, cut = all_states(made, waves_BT), all_states(smaller, waves_BT)
    assert torch.allclose(gated, cut, rtol=0, atol=ROUNDING)


def test_constant_units_go_into_biases() -> None:
    made, waves_BT = conformer(), noise(6000)
    before = all_states(made, waves_BT)
    for group in layout_of(made).groups:
        for part in group.makes:
            part.clear(made.state_dict(), torch.tensor([1]))
    muted = all_states(made, waves_BT)
    dead = dead_units(made)
    assert {name: gone_U.nonzero().flatten().tolist() for name, gone_U in dead.items()} == {
        group.name: [1] for group in layout_of(made).groups
    }
    cut = all_states(remove_units(made, dead), waves_BT)
    assert torch.allclose(muted, cut, rtol=0, atol=ROUNDING)
    assert (before - muted).abs().max() > 100 * ROUNDING


def test_sizes_that_do_not_fit_are_refused() -> None:
    for changes in ({"heads": 3}, {"factor": 6}, {"kernel": 4}):
        with pytest.raises((UserError, ValueError), match="must be a multiple"):
            ConformerConfig.model_validate(TINY.model_dump() | changes)
    assert sum(p.numel() for p in Conformer(ConformerConfig()).parameters()) == pytest.approx(
        6e6, rel=0.1
    )
