"""Scorers that are made once for the tests of train."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch

from train.models.student import Student, variant
from train.scoring.base import Scorer
from train.scoring.score import load
from train.scoring.scorer import StudentScorer


@pytest.fixture(scope="session")
def small() -> StudentScorer:
    """A v1 that was not trained."""
    torch.manual_seed(0)
    return StudentScorer(Student(variant("v1")), "small", "0" * 64)


@pytest.fixture(scope="session")
def v7() -> Scorer:
    return load("v7")


@pytest.fixture(scope="session")
def published() -> Any:
    """The published network as its package has it."""
    distillmos = pytest.importorskip("distillmos")
    with contextlib.redirect_stdout(io.StringIO()):
        return distillmos.ConvTransformerSQAModel().eval()
