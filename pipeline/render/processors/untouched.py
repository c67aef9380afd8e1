"""No processing: the "none" of section IV-B."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.render.processors.interface import Params, Processor, Waves


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Return the waves as they are."""
    return waves_BT


PROCESSOR = Processor(process)
