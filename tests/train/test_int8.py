"""``load(bundle, precision="int8")``: near float32, the same every time, refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional

from data_specs.io.files import sha256_of
from tests.export_helpers import TINY, lively, tiny
from tests.tolerance import HALF_PRECISION, STUDENT
from tests.train_helpers import tone_pcm
from train.export.int8 import write_int8_tensors
from train.export.refit import rounded
from train.files import write_weights
from train.models.student import LEAK, Student
from train.scoring import bundle, int8
from train.scoring.int8 import INT8_FILE, PIECE_FRAMES, read_int8
from train.scoring.score import load

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="PyTorch's int8 needs a CPU with VNNI"
)


def waves(count: int = 4) -> list[np.ndarray]:
    return [tone_pcm(3 * n + 1).astype(np.float32) / 32768 for n in range(count)]


@pytest.fixture(scope="module")
def student() -> Student:
    return tiny()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, student: Student) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    folder.mkdir()
    weights = folder / bundle.WEIGHTS
    write_weights(weights, student.state_dict())
    (folder / bundle.DESCRIPTION).write_text(f'{{"config": {TINY.model_dump_json()}}}')
    write_int8_tensors(folder / INT8_FILE, student, waves(), sha256_of(weights))
    bundle.write_checksums(folder)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_scores_are_near_float32(made: Path) -> None:
    exact, scorer = load(made), load(made, precision="int8")
    clips = [*waves(), waves(1)[0][:30_000], np.tile(waves(1)[0], 2)]
    scores = [exact.score(clip, 16_000) for clip in clips]
    found = [scorer.score(clip, 16_000) for clip in clips]
    assert np.ptp(scores) > 0.05
    difference = np.abs(np.subtract(found, scores))
    assert 0 < difference.max() < HALF_PRECISION
    assert scorer.precision == "int8"
    assert scorer.weights_sha256 == sha256_of(made / INT8_FILE) != exact.weights_sha256


def test_a_score_does_not_depend_on_its_neighbours(made: Path) -> None:
    scorer = load(made, precision="int8")
    together = [score.mos for score in scorer.score_batch(waves(), 16_000)]
    alone = [scorer.score(wave, 16_000) for wave in waves()]
    np.testing.assert_allclose(together, alone, rtol=0, atol=STUDENT)


@pytest.mark.parametrize("frames", [PIECE_FRAMES // 2, PIECE_FRAMES, 3 * PIECE_FRAMES + 8])
def test_a_piece_is_rounded_between_its_own_limits(
    made: Path, student: Student, frames: int
) -> None:
    """Against a float computation with rounded maps and weights, piece by piece."""
    made_of = sha256_of(made / bundle.WEIGHTS)
    ours = read_int8(made, student, made_of)
    tensors = safetensors.torch.load_file(made / INT8_FILE)
    x_1CFT = torch.randn(1, 2, 161, frames, generator=torch.Generator().manual_seed(frames))
    x_1CFT[..., : frames // 3] *= 5
    piece, expected = ours.piece, x_1CFT
    for number, (_, along) in enumerate(TINY.strides):
        weight, bias = tensors[f"{number}.weight"].float(), tensors[f"{number}.bias"]
        if number:
            weight = weight * tensors[f"{number}.scales"][:, None, None, None]
        padded = functional.pad(expected, (1, 1))
        parts = []
        for start in range(0, expected.shape[-1], piece):
            part = padded[..., start : start + piece + 2]
            if number:
                limits = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
                part = rounded(part, limits)
            parts.append(functional.conv2d(part, weight, bias, TINY.strides[number]))
        expected = functional.leaky_relu(torch.cat(parts, -1), LEAK)
        piece //= along
    with torch.inference_mode():
        found = ours(x_1CFT.contiguous(memory_format=torch.channels_last))
    assert found.shape == expected.shape
    away = (found - expected).abs()
    assert float((away < 1e-4 * expected.abs().max()).float().mean()) > 0.99  # ties of rounding


def test_what_is_no_int8_bundle(copy: Path, made: Path, student: Student) -> None:
    for model in ("v7", str(copy / bundle.WEIGHTS)):
        with pytest.raises(ValueError, match=r"is no bundle's folder.*--int8 --calibrate"):
            load(model, precision="int8")
    with pytest.raises(ValueError, match="on cuda take auto"):
        load(copy, device="cuda", precision="int8")
    torch.manual_seed(2)
    write_weights(copy / bundle.WEIGHTS, lively(Student(TINY)).state_dict())
    with pytest.raises(ValueError, match="made of other weights"):
        load(copy, precision="int8")
    (copy / INT8_FILE).write_bytes((made / INT8_FILE).read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or of another kind"):
        load(copy, precision="int8")
    (copy / INT8_FILE).unlink()
    with pytest.raises(ValueError, match=r"int8\.safetensors is missing"):
        load(copy, precision="int8")


def test_tensors_of_another_student(made: Path, student: Student) -> None:
    other = Student(TINY.model_copy(update={"channels": (4, 4, 8)}))
    with pytest.raises(ValueError, match=r"channels \(4, 4, 6\): the student has \(4, 4, 8\)"):
        read_int8(made, other, sha256_of(made / bundle.WEIGHTS))


def test_a_cpu_without_vnni_is_told_what_to_take(
    made: Path, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8.torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match=r"no VNNI.*model\.int8\.onnx"):
        load(made, precision="int8")


def test_from_an_address(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    scorer = load(f"file://{made}", precision="int8")
    assert scorer.score(waves(1)[0], 16_000) == load(made, precision="int8").score(
        waves(1)[0], 16_000
    )
