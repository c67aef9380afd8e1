"""``train export --wheel``: a package that scores by itself, as this project scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from data_specs.io.waves import Resampler
from tests.export_helpers import write_run
from tests.tolerance import rounding
from tests.train_helpers import tone_pcm
from train.__main__ import main
from train.audio import clip_of, to_16k
from train.export import standalone
from train.scoring import bundle
from train.scoring.score import load

RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 47_999)
"""Of telephones, discs and studios; the last one is odd enough to be soxr's."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A bundle with a wheel, the wheel unpacked, and recordings at every rate."""
    top = tmp_path_factory.mktemp("wheel")
    run, out = write_run(top / "run"), top / "bundle"
    command = ["export", "--model", str(run), "--out", str(out), "--wheel", "listener"]
    assert main(command) == 0
    (wheel,) = out.glob("listener-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(top / "site")
    for number, rate in enumerate(RATES):
        pcm_T = tone_pcm(number, int(rate * (9.3 if number % 2 else 3.1)))
        (top / "audio").mkdir(exist_ok=True)
        soundfile.write(top / "audio" / f"{rate}.wav", pcm_T, rate)
    return SimpleNamespace(top=top, run=run, out=out, wheel=wheel, audio=top / "audio")


def scores_of(output: str) -> dict[str, float]:
    lines = output.splitlines()
    assert lines[0] == "path,mos"
    return {
        Path(path).name: float(mos) for path, mos in (line.rsplit(",", 1) for line in lines[1:])
    }


def require_ours(made: SimpleNamespace, found: dict[str, float]) -> None:
    """Within 1e-3 of this project's scores; the command writes three digits (5e-4)."""
    scorer = load(made.run)
    assert sorted(found) == sorted(path.name for path in made.audio.iterdir())
    for name, mos in found.items():
        assert mos == pytest.approx(scorer.score_file(made.audio / name).mos, abs=1e-3)
    assert np.std(list(found.values())) > 0.01


def test_the_command_gives_our_scores_without_our_packages(made: SimpleNamespace) -> None:
    script = (
        "import json, runpy, sys; sys.argv = ['listener', 'score', sys.argv[1]]\n"
        "try: runpy.run_module('listener', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(json.dumps(sorted(loaded & {'torch', 'torchaudio', 'train', 'data_specs'})))"
    )
    command = [sys.executable, "-c", script, str(made.audio)]
    environment = os.environ | {"PYTHONPATH": str(made.top / "site")}
    result = subprocess.run(
        command, env=environment, cwd=made.top, capture_output=True, text=True, check=True
    )
    *lines, loaded = result.stdout.splitlines()
    assert json.loads(loaded) == []
    require_ours(made, scores_of("\n".join(lines)))


def test_importing_it_loads_numpy_alone(made: SimpleNamespace) -> None:
    heavy = "{'onnxruntime', 'soundfile', 'soxr', 'torch'}"
    script = f"import sys, listener; assert not {heavy} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(made.top / "site")}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=made.top, check=True)


@pytest.mark.parametrize("by", ["soft", "sharp"])
@pytest.mark.parametrize("rate", RATES)
def test_the_resampler_is_the_projects(rate: int, by: Resampler) -> None:
    wave_T = np.random.default_rng(rate).uniform(-1, 1, rate).astype(np.float32)
    ours_T, its_T = to_16k(wave_T, rate, by), standalone.resampled(wave_T, rate, by)
    assert len(ours_T) == len(its_T)
    # Filters of up to 475 taps (44.1 kHz; sharp 815) that add up to 1, on values up to 1.
    np.testing.assert_allclose(its_T, ours_T, rtol=0, atol=rounding(815))


@pytest.mark.parametrize("samples", [1, 122_879, 122_880, 122_881, 300_000])
@pytest.mark.parametrize("repeats", [False, True])
def test_the_windows_are_the_projects(made: SimpleNamespace, samples: int, repeats: bool) -> None:
    wave_T = np.arange(samples, dtype=np.float32)
    scorer, clip = load(made.out / bundle.ONNX), clip_of(wave_T, 16_000)
    ours = scorer.parts(clip, "repeat" if repeats else "zero", "exact")
    its = list(standalone.windows(wave_T, repeats))
    assert [part.wave_T.tobytes() for part in ours] == [window_T.tobytes() for window_T in its]


def test_bad_input_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    model = standalone.Model(made.out / bundle.ONNX)
    (tmp_path / "no.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no\.wav"):
        model.score_file(tmp_path / "no.wav")
    for wave in (np.zeros(0), np.zeros((9, 2)), np.zeros(9, np.uint8), np.full(9, np.nan)):
        with pytest.raises(ValueError, match=r"shape|type|finite"):
            model.score(wave, 16_000)
    with pytest.raises(ValueError, match="rate"):
        model.score(np.zeros(9), 0)


def test_integers_count_as_full_scale(made: SimpleNamespace) -> None:
    model, pcm_T = standalone.Model(made.out / bundle.ONNX), tone_pcm(3, 16_000)
    assert model.score(pcm_T, 16_000) == model.score(pcm_T / np.float32(32768), 16_000)


def test_the_same_model_gives_the_same_wheel(made: SimpleNamespace, tmp_path: Path) -> None:
    from train.export.wheel import write_wheel

    files = made.out / bundle.ONNX, made.out / bundle.CARD
    again = write_wheel("listener", *files, tmp_path, "0.1.0")
    assert again.read_bytes() == made.wheel.read_bytes()
    assert again.name == made.wheel.name


def test_a_bundle_with_a_wheel_is_whole_and_is_replaced(made: SimpleNamespace) -> None:
    bundle.verify(made.out)
    assert made.wheel.name in json.loads((made.out / bundle.CHECKSUMS).read_text())["files"]
    bundle.require_replaceable(made.out)


@pytest.mark.parametrize("name", ["Upper", "two-words", "numpy", "json", "class", "", "_a", "../a"])
def test_names_that_are_taken_or_no_names_are_refused(
    name: str, made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--model", str(made.run), "--out", str(tmp_path / "out"), "--wheel", name]
    assert main(command) == 2
    assert "--wheel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.net
def test_it_installs_into_a_fresh_environment(made: SimpleNamespace, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(made.wheel)], check=True)
    command = [tmp_path / "venv" / "bin" / "listener", "score", str(made.audio)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    require_ours(made, scores_of(result.stdout))
