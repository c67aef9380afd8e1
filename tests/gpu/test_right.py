"""Models, processors, masks and a training step on a device against the CPU in float32.

``SPEECH_TEST_DEVICE`` names the device; ``cpu`` rehearses the tests themselves. Random weights
stand in where real ones are missing: what is compared does not depend on what was learnt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from data_specs.io.errors import UserError
from data_specs.processors import Processor as Spec
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from pipeline.render import processors
from pipeline.render.processors import runtime
from pipeline.render.processors.runtime import Runtime
from tests.bench.gpu_steps import DEVICE_VARIABLE
from tests.bench.processors import spread
from tests.bench.prune import random_batch
from tests.bench.random_xlsr import config_of, write_checkpoint
from tests.bench.stand_ins import stand_in_weights
from tests.bench.teacher import HEADS, our_teacher
from tests.conftest import talk
from tests.tolerance import STUDENT, rounding
from train.models.calibration import Affine, Calibration
from train.models.student import Student, variant
from train.models.teacher import load_teacher
from train.pruning.gates import Gates, gated
from train.pruning.select import remove_smallest
from train.pruning.units import layout_of

DEVICE = os.environ.get(DEVICE_VARIABLE, "cuda")
REHEARSED = DEVICE == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSED and not torch.cuda.is_available(), reason="no GPU here"),
]

LABELS = 0.01
"""MOS, at the 99th percentile: what a label may move by fewer bits (as on CPUs)."""

PRECISIONS = ("fp32",) if REHEARSED else ("fp32", "tf32", "bf16", "fp16")
NEURAL: dict[str, dict[str, object]] = {
    "deepfilternet3": {"kind": "deepfilternet3"},
    "demucs": {"kind": "demucs"},
    "hifigan": {"kind": "hifigan", "rate_hz": 16_000},
    "hifigan-coqui": {"kind": "hifigan", "rate_hz": 22_050},
    "encodec": {"kind": "encodec"},
}
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


@cache
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


@cache
def published_labels() -> tuple[np.ndarray, np.ndarray]:
    """Clips and what the published student says of them, on the CPU."""
    waves_BT = clips(3 if REHEARSED else 100)
    return waves_BT, load_teacher("distillmos", "cpu", "fp32").score(waves_BT)[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_of_the_published_student(precision: str) -> None:
    waves_BT, right_B = published_labels()
    _allow_tf32(precision == "tf32", precision == "tf32")
    named = "fp32" if precision == "tf32" else precision
    found_B, _ = load_teacher("distillmos", DEVICE, named).score(waves_BT)
    require_near(found_B, right_B, precision)


XLSR = ("300m", 5) if REHEARSED else ("2b", 10)
"""The shape of the paper's teacher, 2B cut at layer 10; in the rehearsal 300M at layer 5."""


@pytest.fixture(scope="module")
def xlsr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A checkpoint of random weights, and the logits of its labels on the CPU."""
    folder = write_checkpoint(tmp_path_factory.mktemp("xlsr"), config_of(XLSR[0], XLSR[1]))
    _, right_B = our_teacher(folder, XLSR[1], HEADS[XLSR], "cpu", "fp32").score(papers_clips())
    assert right_B is not None
    return folder, right_B


def papers_clips() -> np.ndarray:
    return clips(1 if REHEARSED else 8)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_of_the_papers_teacher(precision: str, xlsr: tuple[Path, np.ndarray]) -> None:
    folder, right_B = xlsr
    _allow_tf32(precision == "tf32", precision == "tf32")
    named = "fp32" if precision == "tf32" else precision
    teacher = our_teacher(folder, XLSR[1], HEADS[XLSR], DEVICE, named)
    _, found_B = teacher.score(papers_clips())
    # Random weights give nearly the same score for every clip: logits, in MOS at the steepest.
    assert found_B is not None
    assert np.abs(found_B - right_B).max() <= (10 * STUDENT if precision == "fp32" else LABELS)
    teacher.calibration = Calibration(universal=Affine(scale=1.5, shift=-0.25))
    _, moved_B = teacher.score(papers_clips())
    assert moved_B == pytest.approx(1.5 * found_B - 0.25, abs=1e-5)  # the last bits of float32


@pytest.fixture(scope="module")
def random_networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with stand_in_weights(tmp_path_factory.mktemp("weights")):
        yield


@cache
def processed_right(name: str) -> np.ndarray:
    return _processed(name, Runtime())


@pytest.mark.usefixtures("random_networks")
@pytest.mark.parametrize("precision", ["fp32"] if REHEARSED else ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name", NEURAL)
def test_neural_processors(name: str, precision: str) -> None:
    try:
        right_BT = processed_right(name)
    except (UserError, ImportError, OSError) as error:
        pytest.skip(f"{name}: {error}")
    _allow_tf32(precision == "tf32", precision == "tf32")
    found_BT = _processed(name, Runtime(DEVICE, "bf16" if precision == "bf16" else "fp32"))
    norms_B = np.linalg.norm(right_BT, axis=1)
    off_B = np.linalg.norm(found_BT - right_BT, axis=1)
    assert (norms_B > 0).all()
    # In float32 whatever is allowed elsewhere.
    most = HALF if precision == "bf16" else RELATIVE
    if name == "encodec" and precision != "bf16":
        # Where two code words are equally near the last bit chooses another: that frame, one of
        # 576, is off by its own size, the clip by the root of that.
        assert np.median(off_B / norms_B) <= most
        most = HALF
    assert (off_B / norms_B).max() <= most


def _processed(name: str, where: Runtime) -> np.ndarray:
    spec = TypeAdapter(Spec).validate_python(NEURAL[name])
    waves_BT = clips(2)[:, : SAMPLE_RATE // 2] if REHEARSED else clips(8)
    before = runtime.current()
    runtime.use(where)
    try:
        return processors.run(spec.kind, waves_BT, spread(spec, len(waves_BT)))
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


def test_gates_scale_the_same_weights() -> None:
    """Drawn on the CPU whatever the device: the same gates; one product each, no sums."""
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(5)
        student = Student(variant("v1")).to(device)
        gates = Gates(layout_of(student)).to(device)
        gates.alphas_N.data.fill_(0.5)
        torch.manual_seed(6)
        drawn_N = gates.drawn()
        assert 0 < int((drawn_N == 0).sum()) < len(drawn_N)
        scaled = gated(student, gates.layout, drawn_N)
        found.append({name: tensor.detach().cpu() for name, tensor in scaled.items()})
    for name, right in found[0].items():
        torch.testing.assert_close(found[1][name], right, rtol=rounding(1), atol=1e-7)


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
