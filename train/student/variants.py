"""The students and what they cost. ``python -m train variants``.

Multiply-adds are those of the convolutions, the linear layers and the attention products, for a
second of audio in a full window (the spectrum is left out: under 2 M a second). Weights are in
float32; "training" is what is kept of each clip of 7.68 s for the gradient, in float32.
"""

from __future__ import annotations

import argparse

from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.models.student import VARIANTS, count, saved_for_backward


def table() -> str:
    """One line a variant."""
    lines = [
        f"{'name':5}{'parameters':>12}{'M MAC/s':>9}{'weights':>11}{'training':>14}{'tokens':>8}"
        f"{'dim':>5}{'layers':>8}  convolutions"
    ]
    for name, config in VARIANTS.items():
        parameters, macs = count(config)
        a_second = macs / (CROP_SAMPLES / SAMPLE_RATE)
        lines.append(
            f"{name:5}{parameters:12,}{a_second / 1e6:9,.0f}{parameters * 4 / 1e6:8.1f} MB"
            f"{saved_for_backward(config) / 1e6:8.0f} MB/clip{config.tokens:8}{config.dim:5}"
            f"{config.layers:8}  {'-'.join(map(str, config.channels))}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``python -m train variants`` has no options."""


def run(args: argparse.Namespace) -> int:
    """``python -m train variants``; returns the exit code."""
    print(table())
    return 0
