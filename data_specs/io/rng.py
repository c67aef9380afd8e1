"""The only source of random numbers.

One named stream per decision, with Philox 4x64 as a counter-based generator: the key is a hash of
(seed, name) and the counter is the sample's index. So the number that decides, say, the SNR of
sample 123 depends on nothing else: not on other decisions, other samples, workers or order. Adding
a decision moves no other, and a whole range of samples is drawn in one call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WORDS_PER_SAMPLE = 4
"""A Philox 4x64 counter step gives four words; a sample owns one step of every stream."""


def spelled_out(number: float) -> np.random.Generator:
    """A generator that spells a drawn number out into a pattern: no draw, the same each time."""
    return np.random.Generator(Philox(int(number)))


Uniform = Callable[[str], Floats]
"""``uniform(name)``: one number in [0, 1) per sample of a range."""


def uniforms(seed: int, start: int, count: int) -> Uniform:
    """A function that gives every decision of the range its own uniform numbers."""

    def uniform(name: str) -> Floats:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        words = Philox(key=key, counter=start).random_raw(WORDS_PER_SAMPLE * count)
        high_bits = words[::WORDS_PER_SAMPLE] >> np.uint64(11)
        return high_bits.astype(np.float64) * 2.0**-53  # a double's resolution, on all machines

    return uniform
