"""Augmentation of a batch of waves. Pure functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_specs.io.waves import FADE_SAMPLES, Padding
from data_specs.sample import SAMPLE_RATE
from train.data.order import generator

SHORTEST_CROP_S = 1.0
ROUGHNESS_ORDER = 4
STREAM_AUGMENT, STREAM_CROPS = 1_000, 1_001
"""Which decision a random generator is for: one stream each, so that none moves another."""


def augment(
    waves_BT: Tensor,
    lengths_B: Tensor,
    seed: int,
    step: int,
    crops: float = 0.0,
    rank: int = 0,
    world: int = 1,
    padding: Padding = "zero",
) -> Tensor:
    """Flip the polarity of half of the waves, rotate each by a random time, and crop some.

    ``waves_BT`` are (B, T) with ``lengths_B`` (B,) samples each and zeros behind them. Polarity is
    nothing that a listener would tell, nor is rotation once the end goes over into the beginning
    without a click (``seamless``). ``crops`` is the share of clips that are cut to 1 s up to their
    length, and then repeated or (half of them) filled with zeros: a student that only saw whole
    windows takes the silence behind a short clip for a fault of it. With ``padding`` "repeat"
    whatever is short is repeated. The rows are ``rank``, ``rank + world``, ... of the joint batch,
    and get what they would get there.
    """
    draws = _Draws(seed, step, len(waves_BT) * world, crops, padding == "repeat")
    rows = range(rank, len(waves_BT) * world, world)
    parts = [
        draws.part(wave_T[: int(length)], row)
        for wave_T, length, row in zip(waves_BT, lengths_B.tolist(), rows, strict=True)
    ]
    loops = seamless(parts)
    return torch.stack(
        [
            draws.applied(part, loop, row, waves_BT.shape[1])
            for part, loop, row in zip(parts, loops, rows, strict=True)
        ]
    )


class _Draws:
    """The random decisions for every row of a joint batch."""

    def __init__(self, seed: int, step: int, rows: int, crops: float, repeats: bool) -> None:
        draw = generator(seed, STREAM_AUGMENT, step)
        self.sign = draw.integers(0, 2, rows) * 2 - 1
        self.shift = draw.random(rows)
        cropped, self.length, self.start, zeros = generator(seed, STREAM_CROPS, step).random(
            (4, rows)
        )
        self.cropped, self.repeats = cropped < crops, repeats
        self.repeated = self.cropped & (zeros >= 0.5) | repeats

    def part(self, wave_T: Tensor, row: int) -> Tensor:
        """What is kept of a wave: all of it, or a crop."""
        if not self.cropped[row]:
            return wave_T
        length = len(wave_T)
        shortest = min(length, round(SHORTEST_CROP_S * SAMPLE_RATE) + FADE_SAMPLES)
        kept = round(shortest + self.length[row] * (length - shortest))
        first = round(self.start[row] * (length - kept))
        return wave_T[first : first + kept]

    def applied(self, part_T: Tensor, loop_T: Tensor | None, row: int, samples: int) -> Tensor:
        """One part, rotated where there is a loop of it, turned, and filled up to ``samples``."""
        if loop_T is not None:
            loop_T = loop_T.roll(int(self.shift[row] * len(loop_T)))
            part_T = filled(loop_T, samples if self.repeated[row] else len(part_T), zeros=False)
        return filled(part_T * int(self.sign[row]), samples, zeros=not self.repeats)


def seamless(parts: Sequence[Tensor]) -> list[Tensor | None]:
    """One period of each wave as it may be repeated: its end goes over into its beginning.

    The wave itself where its end meets its beginning as smoothly as it runs near them: in a pause,
    in noise. Else both are cross-faded at equal power (where they are alike, at the power of
    either), and the period is 50 ms shorter. None for what is too short for that (0.2 s).
    """
    fade = FADE_SAMPLES
    ends_BF = torch.stack([filled(part[-fade:], fade, zeros=True) for part in parts])
    starts_BF = torch.stack([filled(part[:fade], fade, zeros=True) for part in parts])
    mixed_BF, meets = _mixed(ends_BF, starts_BF), _meet(ends_BF, starts_BF)
    return [
        None
        if len(part) < 4 * fade
        else part
        if meet
        else torch.cat([mixed_F, part[fade : len(part) - fade]])
        for part, mixed_F, meet in zip(parts, mixed_BF, meets, strict=True)
    ]


def _mixed(ends_BF: Tensor, starts_BF: Tensor) -> Tensor:
    fade = ends_BF.shape[1]
    angle_F = (torch.arange(fade, device=ends_BF.device) + 0.5) / fade * (torch.pi / 2)
    energy_B1 = (ends_BF.square().sum(1) * starts_BF.square().sum(1)).sqrt()[:, None]
    alike_B1 = ((ends_BF * starts_BF).sum(1)[:, None] / energy_B1).clamp(min=0).nan_to_num()
    alike_B1 = alike_B1.mul(100).round().div(100)  # whatever the order of the sum
    mixed_BF = ends_BF * angle_F.cos() + starts_BF * angle_F.sin()
    return mixed_BF / (1 + alike_B1 * (2 * angle_F).sin()).sqrt()


def _meet(ends_BF: Tensor, starts_BF: Tensor) -> list[bool]:
    """Whether each seam is no rougher than both its sides are, and these go on as noise does.

    Rough is what a polynomial of third order does not foresee (fourth differences). A voice or a
    tone is also known by its periods: there a small step is audible.
    """
    order = ROUGHNESS_ORDER
    sides = [part.diff(n=order).abs().amax(1) for part in (ends_BF, starts_BF)]
    seam_BN = torch.cat([ends_BF[:, -order:], starts_BF[:, :order]], 1).diff(n=order)
    smooth_B = seam_BN.abs().amax(1) <= 2 * torch.minimum(*sides)
    found: list[bool] = (smooth_B & ~_periodic(ends_BF) & ~_periodic(starts_BF)).tolist()
    return found


def _periodic(waves_BF: Tensor) -> Tensor:
    """Whether each wave is half like itself 2 to 25 ms later; white noise is so by a sixth."""
    fade = waves_BF.shape[1]
    waves_BF = waves_BF - waves_BF.mean(1, keepdim=True)
    power = torch.fft.rfft(waves_BF, 2 * fade).abs().square()
    alike_BF = torch.fft.irfft(power)[:, 32 : fade // 2] > 0.5 * waves_BF.square().sum(1)[:, None]
    return alike_BF.any(1)


def filled(wave_T: Tensor, samples: int, zeros: bool) -> Tensor:
    """A wave made ``samples`` long: zeros behind it, or itself again and again."""
    if len(wave_T) >= samples:
        return wave_T[:samples]
    if zeros:
        return torch.nn.functional.pad(wave_T, (0, samples - len(wave_T)))
    return wave_T.repeat(-(-samples // len(wave_T)))[:samples]
