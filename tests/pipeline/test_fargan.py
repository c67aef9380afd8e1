"""FARGAN: the real program, built from the pinned sources where they are at hand.

What it shares with LPCNet (limits, failures, where it is found) is in ``test_demucs_lpcnet``.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_specs.io.files import sha256_of
from pipeline.audio import read_part
from pipeline.corpora.weights import FOLDER_VARIABLE
from pipeline.render.mix import fit_length
from pipeline.render.processors import fargan, weights_sha256
from tests.conftest import ROOT, small_recipe
from tests.pipeline.test_demucs_lpcnet import check_process, envelope, lag_samples

SECONDS = 3


def real_speech(shared: Path, count: int) -> np.ndarray:
    paths = sorted((shared / "data" / "speech" / "test-other").rglob("*.flac"))
    length = SECONDS * 16_000 + 123  # no whole frames
    picked = paths[:: len(paths) // count][:count]
    return np.stack([fit_length(read_part(path, 0, length), length) for path in picked])


@pytest.mark.shared
def test_the_real_program_speaks_in_time_and_repeats_itself(
    fargan_demo: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocoder makes its own phases: what must be in place are the envelope's rises and falls.

    A frame of 10 ms has one gain and one pitch, so that a quarter of it is as near as can be asked.
    """
    monkeypatch.setenv(fargan.PROGRAM.variable, str(fargan_demo))
    monkeypatch.chdir(tmp_path)
    waves = real_speech(shared, 4)
    out = check_process(fargan.PROCESSOR, waves, [{}] * 4, tmp_path)
    for before, after in zip(waves, out, strict=True):
        assert abs(10 * np.log10(np.mean(after**2) / np.mean(before**2))) < 2
        assert np.corrcoef(envelope(before), envelope(after))[0, 1] > 0.9
        assert abs(lag_samples(envelope(before), envelope(after))) <= 40
        assert np.corrcoef(before, after)[0, 1] < 0.95  # it is made anew, not passed on


@pytest.mark.shared
@pytest.mark.parametrize("length", [1, 160, 161])
def test_the_real_program_takes_any_length_and_silence(
    length: int, fargan_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fargan.PROGRAM.variable, str(fargan_demo))
    out = fargan.PROGRAM.process(np.zeros((1, length), np.float32), [{}])
    assert out.shape == (1, length) and np.abs(out).max() < 1e-3


def test_the_program_itself_is_part_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "fargan_demo"
    shutil.copy("/bin/true", program)
    monkeypatch.setenv(fargan.PROGRAM.variable, str(program))
    stage = {"stage": "vocoder", "choices": [{"use": {"kind": "fargan"}}]}
    assert weights_sha256(small_recipe(stages=(stage,))) == {"fargan": sha256_of(program)}


def test_without_the_program_it_says_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(fargan.PROGRAM.variable, raising=False)
    with pytest.raises(FileNotFoundError, match="run make fargan, or set FARGAN_DEMO to") as error:
        fargan.PROGRAM.process(np.zeros((1, 160), np.float32), [{}])
    assert str(tmp_path / "fargan" / "fargan_demo") in str(error.value)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("content", [None, b"another file"])
@pytest.mark.parametrize(
    ("target", "variable", "name"),
    [
        ("fargan", "FARGAN_SOURCES", "opus_1.6.1.orig.tar.xz"),
        ("hifigan", "HIFIGAN_SOURCE", "model_file.pth"),
    ],
)
def test_make_takes_the_pinned_file_alone(
    target: str, variable: str, name: str, content: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content:
        file.write_bytes(content)
    command = ["make", "-f", str(ROOT / "Makefile"), target, f"{variable}={tmp_path}"]
    command.append(f"WEIGHTS={tmp_path / 'weights'}")
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert run.returncode and str(tmp_path) in run.stdout + run.stderr
    said = "not unpacked" if content and target == "fargan" else f"{variable}=DIR"
    assert said in run.stdout + run.stderr
    assert sorted(tmp_path.iterdir()) == ([file] if content else [])
