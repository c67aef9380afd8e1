"""``python -m tests.bench machines``: what is told of two runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from tests.bench.machines import compared, made


def audio(*samples: int) -> np.ndarray:
    return np.array(samples, np.int16)


def test_shares_and_distances_are_over_all_samples() -> None:
    own = {"a": (audio(1, 2), 3.0), "b": (audio(-32768, 5), 2.0)}
    other = {"a": (audio(1, 2), 3.5), "b": (audio(32767, 5), 2.0)}
    assert compared(own, own) == ["100%", "0", "100%", "0", "0"]
    assert compared(own, other) == ["50%", "65535", "50%", "0.49", "0.5"]


def test_other_samples_are_no_comparison() -> None:
    with pytest.raises(ValueError, match=r"other samples: \['b'\]"):
        compared({"a": (audio(1), 3.0)}, {"a": (audio(1), 3.0), "b": (audio(1), 3.0)})


@pytest.mark.slow
def test_a_command_that_fails_tells_its_last_words(tmp_path: Path) -> None:
    options = argparse.Namespace(recipe="demo", samples=4)
    with pytest.raises(RuntimeError, match="nowhere"):
        made(tmp_path / "out", options, {"speech": [tmp_path / "nowhere"]}, {})
