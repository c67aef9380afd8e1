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
Words = NDArray[np.uint64]

WORDS_PER_SAMPLE = 4
"""A Philox 4x64 counter step gives four words; a sample owns one step of every stream."""


def stream(seed: int, name: str, start: int, count: int) -> Words:
    """Random words of decision ``name`` for samples ``start`` to ``start + count`` (count, 4)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    generator = Philox(key=key, counter=start)
    return generator.random_raw(WORDS_PER_SAMPLE * count).reshape(count, WORDS_PER_SAMPLE)


def unit(words: Words) -> Floats:
    """Numbers in [0, 1): the 53 high bits, the resolution of a double, the same on all machines."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def spelled_out(number: float) -> np.random.Generator:
    """A generator that spells a drawn number out into a pattern: no draw, the same each time."""
    return np.random.Generator(Philox(int(number)))


Uniform = Callable[[str], Floats]
"""``uniform(name)``: one number in [0, 1) per sample of a range."""


def uniforms(seed: int, start: int, count: int) -> Uniform:
    """A function that gives every decision of the range its own uniform numbers."""

    def uniform(name: str) -> Floats:
        return unit(stream(seed, name, start, count)[:, 0])

    return uniform
