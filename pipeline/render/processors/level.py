"""Another level between two stages; beyond full scale it clips, as 16 bits do."""

from __future__ import annotations

import numpy as np

from pipeline.audio import Wave
from pipeline.render.mix import gain
from pipeline.render.processors.interface import Params, Processor, each


def change(wave: Wave, params: Params) -> Wave:
    """Amplify a wave by its ``gain_db``."""
    return np.clip(gain(wave, params["gain_db"]), -1, 1)


PROCESSOR = Processor(each(change))
