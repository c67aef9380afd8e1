"""Models, processors, masks and a training step on a device against the CPU in float32.

``SPEECH_TEST_DEVICE`` names the device; ``cpu`` rehearses the tests themselves. Random weights
stand in where real ones are missing: what is compared does not depend on what was learnt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from data_specs.io.errors import UserError
from data_specs.processors import Processor as Spec
from data_specs.sample import CROP_SAMPLES
from pipeline.render import processors
from pipeline.render.processors import runtime
from pipeline.render.processors.runtime import Runtime
from tests.bench.gpu_steps import DEVICE_VARIABLE
from tests.bench.prune import random_batch
from tests.bench.random_xlsr import config_of, write_checkpoint
from tests.bench.stand_ins import stand_in_weights
from tests.conftest import talk
from tests.tolerance import STUDENT, rounding
from train.models.teacher import load_teacher
from train.pruning.select import remove_smallest

DEVICE = os.environ.get(DEVICE_VARIABLE, "cuda")
REHEARSED = DEVICE == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSED and not torch.cuda.is_available(), reason="no GPU here"),
]

LABELS = 0.01
"""MOS, at the 99th percentile: what a label may move by fewer bits (as on CPUs)."""

PRECISIONS = ("fp32",) if REHEARSED else ("fp32", "tf32", "bf16", "fp16")
NEURAL = ("deepfilternet3", "demucs", "hifigan", "encodec")
RELATIVE = rounding(4096, layers=40)
"""Of a wave's norm, in float32, behind 40 layers of sums of up to 4096 products."""

HALF = 0.05
"""The same with operands of 8 bits (bf16, 2^-9 each) or 11 (TF32), over as many layers."""


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 is float32: cuDNN would take TF32 for convolutions without a word."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    _allow_tf32(False, False)
    yield
    _allow_tf32(*before)


def _allow_tf32(convolutions: bool, products: bool) -> None:
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


def clips(count: int) -> np.ndarray:
    """Speech-like clips (B, 122880), some short, at several levels, in noise."""
    rng, waves_BT = np.random.default_rng(3), np.zeros((count, CROP_SAMPLES), np.float32)
    for number, wave_T in enumerate(waves_BT):
        spoken_T = talk((7.68, 4.0, 1.5)[number % 3], number)[:CROP_SAMPLES]
        noise_T = rng.standard_normal(len(spoken_T)) * 10.0 ** -rng.uniform(1, 4)
        wave_T[: len(spoken_T)] = (spoken_T + noise_T) * rng.uniform(0.05, 0.5)
    return waves_BT.clip(-1, 1)


def require_near(found_B: np.ndarray, right_B: np.ndarray, precision: str) -> None:
    difference_B = np.abs(found_B - right_B)
    if precision == "fp32":
        assert difference_B.max() <= 10 * STUDENT  # other kernels: sums of 4096 in another order
    else:
        assert np.quantile(difference_B, 0.99) <= LABELS
    assert right_B.std() > 0.01


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_of_the_published_student(precision: str) -> None:
    waves_BT = clips(6 if REHEARSED else 100)
    right_B, _ = load_teacher("distillmos", "cpu", "fp32").score(waves_BT)
    _allow_tf32(precision == "tf32", precision == "tf32")
    named = "fp32" if precision == "tf32" else precision
    found_B, _ = load_teacher("distillmos", DEVICE, named).score(waves_BT)
    require_near(found_B, right_B, precision)


@pytest.fixture(scope="module")
def xlsr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of the paper's teacher, 2B cut at layer 10; in the rehearsal 300M at layer 5."""
    size, layers = ("300m", 6) if REHEARSED else ("2b", 11)
    return write_checkpoint(tmp_path_factory.mktemp("xlsr"), config_of(size, layers))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_of_the_papers_teacher(precision: str, xlsr: Path) -> None:
    from tests.bench.teacher import HEADS, our_teacher

    key = ("300m", 5) if REHEARSED else ("2b", 10)
    waves_BT = clips(2 if REHEARSED else 16)
    right_B = our_teacher(xlsr, key[1], HEADS[key], "cpu", "fp32").score(waves_BT)[1]
    _allow_tf32(precision == "tf32", precision == "tf32")
    named = "fp32" if precision == "tf32" else precision
    found_B = our_teacher(xlsr, key[1], HEADS[key], DEVICE, named).score(waves_BT)[1]
    # Random weights give nearly the same score for every clip: logits, in MOS at the steepest.
    assert found_B is not None and right_B is not None
    assert np.abs(found_B - right_B).max() <= (10 * STUDENT if precision == "fp32" else LABELS)


@pytest.mark.parametrize("precision", ["fp32"] if REHEARSED else ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("kind", NEURAL)
def test_neural_processors(kind: str, precision: str, tmp_path: Path) -> None:
    waves_BT = clips(2 if REHEARSED else 8)
    with stand_in_weights(tmp_path):
        try:
            right_BT = _processed(kind, waves_BT, Runtime())
        except (UserError, ImportError, OSError) as error:
            pytest.skip(f"{kind}: {error}")
        _allow_tf32(precision == "tf32", precision == "tf32")
        named = "bf16" if precision == "bf16" else "fp32"
        found_BT = _processed(kind, waves_BT, Runtime(DEVICE, named))
    norms_B = np.linalg.norm(right_BT, axis=1)
    off_B = np.linalg.norm(found_BT - right_BT, axis=1)
    assert (norms_B > 0).all()
    assert (off_B / norms_B).max() <= (RELATIVE if precision == "fp32" else HALF)


def _processed(kind: str, waves_BT: np.ndarray, where: Runtime) -> np.ndarray:
    spec = TypeAdapter(Spec).validate_python({"kind": kind})
    even = np.linspace(0.1, 0.9, len(waves_BT))
    columns = processors.PROCESSORS[kind].draw(spec, lambda name: even, "gpu")
    params = [{n: float(c[i]) for n, c in columns.items()} for i in range(len(waves_BT))]
    before = runtime.current()
    runtime.use(where)
    try:
        return processors.run(kind, waves_BT, params)
    finally:
        runtime.use(before)


def test_the_smallest_scores_are_the_same_ones() -> None:
    """Selection is exact: no rounding lets another weight go."""
    generator = torch.Generator().manual_seed(4)
    scores = {name: torch.rand(300, 400, generator=generator).round(decimals=3) for name in "ab"}
    masks = [{n: torch.ones_like(s, dtype=torch.bool, device=d) for n, s in scores.items()}
             for d in ("cpu", DEVICE)]  # fmt: skip
    for mask, device in zip(masks, ("cpu", DEVICE), strict=True):
        remove_smallest({n: s.to(device) for n, s in scores.items()}, mask, 5_000)
    assert sum(int((~m).sum()) for m in masks[0].values()) == 5_000
    assert all(torch.equal(masks[0][name], masks[1][name].cpu()) for name in scores)


def test_a_training_step() -> None:
    from tests.bench.gpu_steps import trainer

    losses, weights = [], []
    for device in ("cpu", DEVICE):
        task = trainer("v1", 4, device, compiled=False, precision="fp32")
        losses.append(float(task.update(random_batch(4))))
        state = task.student.state_dict()
        weights.append(torch.cat([t.flatten().double().cpu() for t in state.values()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    # AdamW's first step is the sign of the gradient times the rate: where the gradient is rounding
    # alone the sign may differ, by two rates at most.
    assert float((weights[0] - weights[1]).abs().median()) <= RELATIVE
