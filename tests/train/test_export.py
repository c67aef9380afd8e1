"""``python -m train export``: what comes out scores as what went in."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import soundfile
import torch
import yaml

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.waves import Resampler
from tests.conftest import ROOT
from tests.tolerance import HALF_PRECISION, STUDENT, rounding

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.export_helpers import TINY, lively, tiny, write_run
from tests.train_helpers import tone_pcm, write_dataset, write_rated
from train.__main__ import main
from train.audio import to_16k
from train.export.card import card_text, read_results
from train.export.clips import read_clips
from train.export.export import add_arguments, open_source
from train.export.export import run as export
from train.export.int8 import calibrated
from train.export.parity import compare
from train.export.refit import (
    Int8Convolution,
    as_int8,
    convolutions_of,
    evened,
    refit,
    rounded_weight,
)
from train.models.encoders.student_encoder import StudentEncoder
from train.models.student import Student, count, v7_weights_path, variant
from train.scoring import bundle
from train.scoring.onnx_scorer import OnnxScorer
from train.scoring.score import load

pytest.importorskip("onnxscript")


FIT = {"steps": 7, "batch": 2, "preset": "fast", "seed": 3, "samples": 12, "rated_clips": 4}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run, shards, rated clips, and the run's export with everything."""
    top = tmp_path_factory.mktemp("export")
    run = write_run(top / "run", student="tiny", recipe_hash="abc", teacher="someone", fit=FIT)
    shards = write_dataset(top / "shards", 2, 4)
    rated, out = write_rated(top / "rated"), top / "bundle"
    arguments = ["export", "--model", str(run), "--out", str(out), "--int8"]
    arguments += ["--calibrate", str(shards), "--parity", str(rated)]
    assert main(arguments) == 0
    return SimpleNamespace(top=top, run=run, shards=shards, rated=rated, out=out)


def clips(seconds: tuple[float, ...] = (0.5, 7.68, 12.3)) -> list[np.ndarray]:
    return [
        tone_pcm(3 * n, int(length * 16_000)).astype(np.float32) / 32768
        for n, length in enumerate(seconds)
    ]


def test_the_bundle_is_a_model_that_load_reads(made: SimpleNamespace) -> None:
    bundle.verify(made.out)
    before, after = load(made.run), load(made.out)
    for wave in clips():
        assert after.score(wave, 16_000) == before.score(wave, 16_000)
    about = json.loads((made.out / "model.json").read_text())
    assert about["made_from"] == {"model": "run", "weights_sha256": before.weights_sha256}
    assert about["weights_sha256"] == after.weights_sha256
    assert about["recipe_hash"] == "abc"


def test_onnx_scores_as_pytorch(made: SimpleNamespace) -> None:
    exported, scorer = OnnxScorer(made.out / "model.onnx"), load(made.run)
    scores = [scorer.score(wave, 16_000) for wave in clips()]
    assert np.ptp(scores) > 0.05
    found = [exported.score(wave, 16_000) for wave in clips()]
    np.testing.assert_allclose(found, scores, rtol=0, atol=STUDENT)


def test_what_it_was_trained_to_hear_behind_short_clips_goes_with_it(tmp_path: Path) -> None:
    """Its own padding is the default wherever it is scored: run, bundle, ONNX file."""
    config = TINY.model_copy(update={"padding": "repeat"})
    network = lively(Student(config))
    run = write_run(tmp_path / "run", network, config=config.model_dump(mode="json"))
    assert main(["export", "--model", str(run), "--out", str(tmp_path / "out")]) == 0
    wave_T = clips((1.5,))[0]
    models = [load(run), load(tmp_path / "out"), OnnxScorer(tmp_path / "out/model.onnx")]
    for model in models:
        own = model.score(wave_T, 16_000)
        assert own == model.score(wave_T, 16_000, padding="repeat")
        assert own != pytest.approx(model.score(wave_T, 16_000, padding="zero"), abs=10 * STUDENT)
        assert own == pytest.approx(models[0].score(wave_T, 16_000), abs=STUDENT)
    assert "padding" not in TINY.model_dump(mode="json")  # files of before say nothing of it


def test_any_batch_gives_each_windows_own_score(made: SimpleNamespace) -> None:
    exported = OnnxScorer(made.out / "model.onnx")
    waves_BT = np.stack([tone_pcm(n).astype(np.float32) / 32768 for n in range(5)])
    alone = exported.score_windows(list(waves_BT))
    for size in (1, 2, 5):
        (together,) = exported.session.run(["mos"], {"waves": waves_BT[:size]})
        assert together.shape == (size,)
        np.testing.assert_allclose(together, alone[:size], rtol=0, atol=STUDENT)


def test_a_file_says_what_it_is(made: SimpleNamespace) -> None:
    weights = load(made.out).weights_sha256
    for name, precision in (("model.onnx", "fp32"), ("model.int8.onnx", "int8")):
        exported = OnnxScorer(made.out / name)
        facts = exported.session.get_modelmeta().custom_metadata_map
        assert facts["sample_rate"] == "16000" and facts["window_samples"] == "122880"
        assert facts["hop_samples"] == "16000" and facts["weights_sha256"] == weights
        assert exported.name == f"run (onnx {precision})"
        assert exported.weights_sha256 == bundle.sha256_of(made.out / name) != weights


def test_a_file_is_little_more_than_its_weights_and_names_no_folder(made: SimpleNamespace) -> None:
    file = (made.out / "model.onnx").read_bytes()
    assert len(file) < (made.out / "model.safetensors").stat().st_size + 40_000
    assert str(ROOT).encode() not in file


def test_weights_rounded_to_half_precision_are_those_of_all_files(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    assert (
        main(["export", "--model", str(made.run), "--out", str(tmp_path / "half"), "--half"]) == 0
    )
    half, whole = load(tmp_path / "half"), load(made.run)
    folders = (made.out, tmp_path / "half")
    floats, halves = ((folder / "model.safetensors").stat().st_size for folder in folders)
    assert floats - halves > 1.9 * count(TINY)[0]
    exported = OnnxScorer(tmp_path / "half/model.onnx")
    for wave in clips():
        score = half.score(wave, 16_000)
        assert exported.score(wave, 16_000) == pytest.approx(score, abs=STUDENT)
        assert 0 < abs(score - whole.score(wave, 16_000)) < HALF_PRECISION


def test_weights_too_large_for_half_precision_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny()
    student.head.projection.bias.data[0] = 1e5
    run, out = write_run(tmp_path / "run", student), tmp_path / "half"
    assert main(["export", "--model", str(run), "--out", str(out), "--half"]) == 2
    assert "--half: tensor 'head.projection.bias' holds values" in capsys.readouterr().err
    assert not out.exists()


def test_int8_multiplies_bytes_and_stays_near(made: SimpleNamespace) -> None:
    import onnx

    model = onnx.load(str(made.out / "model.int8.onnx"))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    kinds = [
        stored[name].data_type
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        for name in node.input[:1]
        if name in stored and len(stored[name].dims) == 4
    ]
    assert kinds == [onnx.TensorProto.INT8] * (len(TINY.channels) - 1)
    scorer, exported = load(made.run), OnnxScorer(made.out / "model.int8.onnx")
    waves = read_clips(made.shards, 8)
    difference = np.subtract(exported.score_windows(waves), scorer.score_windows(waves))
    assert 0 < np.abs(difference).max() < HALF_PRECISION


def test_int8_of_a_bundle_is_loaded_by_its_precision(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    expected = OnnxScorer(made.out / "model.int8.onnx").score(clips()[0], 16_000)
    for model in (made.out, str(made.out), f"file://{made.out}"):
        scorer = load(model, precision="int8")
        assert scorer.precision == "int8" and scorer.score(clips()[0], 16_000) == expected
    for model in ("v7", str(made.out / "model.onnx")):
        with pytest.raises(ValueError, match=r"is no bundle's folder.*--int8 --calibrate"):
            load(model, precision="int8")
    with pytest.raises(ValueError, match="on cuda take auto"):
        load(made.out, device="cuda", precision="int8")
    with pytest.raises(ValueError, match=r"model\.int8\.onnx is missing"):
        load(made.run, precision="int8")
    with pytest.raises(ValueError, match="take exact"):
        load(made.out, precision="int8").score(clips()[2], 16_000, mode="fast")


def test_the_parity_report_is_what_is_measured_again(made: SimpleNamespace) -> None:
    told = json.loads((made.out / "parity.json").read_text())
    assert told["clips_of"] == "labels.csv"
    files = [made.out / name for name in told["files"]]
    again = compare(load(made.run), files, read_clips(made.rated, 6))
    for name, row in told["files"].items():
        assert row["clips"] == 6 and row["bytes"] == (made.out / name).stat().st_size
        assert row["max"] == pytest.approx(again[name].max, abs=STUDENT)
        assert row["mean"] <= row["p99"] <= row["max"]
        assert row["speed"] == pytest.approx(row["torch_cpu_seconds"] / row["cpu_seconds"])
    assert told["files"]["model.onnx"]["max"] < 1e-4 < told["files"]["model.int8.onnx"]["max"]
    assert "`model.int8.onnx`" in (made.out / "parity.md").read_text()


def heavy_tailed(seed: int, clips: int) -> list[torch.Tensor]:
    """Spectra (1, 2, 40, 96) that are mostly quiet, with rare peaks, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 1, 40, 96)
    return [
        torch.randn(1, 2, *shape[2:], generator=generator)
        * torch.exp(1.5 * torch.randn(shape, generator=generator))
        for _ in range(clips)
    ]


def some_convolutions(spread: float = 0) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for previous, channels in ((2, 24), (24, 24), (24, 24)):
        convolution = torch.nn.Conv2d(previous, channels, 3, padding=(0, 1))
        convolution.weight.data *= torch.logspace(-spread, spread, channels)[:, None, None, None]
        convolution.bias.data -= 0.1  # most of the sums are negative, as a trained network's are
        layers += [convolution, torch.nn.LeakyReLU(0.1)]
    return torch.nn.Sequential(*layers)


def shift(convolutions: torch.nn.Sequential, made: list[Int8Convolution], seed: int) -> float:
    """What int8 shifts the last convolution's sums by, on average over clips."""
    errors, layers = [], convolutions_of(convolutions)
    for spectrum in heavy_tailed(seed, 6):
        coarse, exact = spectrum, convolutions[:-1](spectrum)
        for layer, one in zip(layers[:-1], made, strict=False):
            coarse = as_int8(one, layer, coarse)
        weight = rounded_weight(made[-1].weight)
        sums = torch.nn.functional.conv2d(coarse, weight, made[-1].bias, padding=(0, 1))
        errors.append((sums - exact).mean(dim=(0, 2, 3)))
    return float(torch.stack(errors).mean(0).norm())


def test_refitted_convolutions_are_shifted_less_on_clips_that_the_fit_has_not_seen() -> None:
    convolutions = some_convolutions()
    with torch.inference_mode():
        fitted = refit(convolutions, heavy_tailed(1, 12))
        own = [
            replace(one, weight=layer.weight, bias=layer.bias)
            for one, layer in zip(fitted, convolutions_of(convolutions), strict=True)
        ]
        assert shift(convolutions, fitted, 2) < 0.7 * shift(convolutions, own, 2)


def test_channels_evened_out_give_the_same_float_network() -> None:
    convolutions, spectra = some_convolutions(spread=1), heavy_tailed(3, 4)
    with torch.no_grad():
        even = evened(convolutions, spectra)
        for spectrum in spectra:
            expected = convolutions(spectrum)
            atol = rounding(9 * 128, expected.abs().max(), layers=12)
            torch.testing.assert_close(even(spectrum), expected, rtol=0, atol=atol)
        spread = []
        for network in (convolutions, even):
            power_C = network[1](network[0](spectra[0])).square().mean(dim=(0, 2, 3))
            spread.append(float(power_C.max() / power_C.min()))
    assert spread[1] < spread[0] / 5


def test_calibration_is_the_same_every_time(made: SimpleNamespace) -> None:
    waves = read_clips(made.shards, 3)
    student = tiny()
    first, second = (calibrated(student, waves) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert (one.before, one.after) == (other.before, other.after)


def test_the_card_tells_what_is_known_and_what_is_not(made: SimpleNamespace) -> None:
    text = (made.out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "other"
    assert "Not chosen yet" in text and "fill in" in text
    assert "abc" in text and "7 steps of 2" in text and "None were given" in text
    sums = json.loads((made.out / "checksums.json").read_text())["files"]
    for name, entry in sums.items():
        assert name == "README.md" or entry["sha256"] in text


def test_the_card_of_v7_and_of_results(tmp_path: Path) -> None:
    row = {
        "model": "v7",
        "set": "a|b",
        "kind": "rated",
        "padding": "zero",
        "clips": 78,
        "pcc": 0.9064,
        "pcc_low": 0.8,
        "pcc_high": 0.94,
    }
    (tmp_path / "results.json").write_text(json.dumps({"sets": [row]}))
    about = {
        "config": TINY.model_dump(mode="json"),
        "made_from": {"model": "v7", "weights_sha256": "f" * 64},
        "version": "1",
    }
    text = card_text(about, {}, {})  # a run whose folder is called v7
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"
    about["made_from"] = {"model": "v7", "weights_sha256": sha256_of(v7_weights_path())}
    about["results"] = read_results(tmp_path)
    text = card_text(about, {"model.safetensors": "e" * 64}, {})
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert "| v7 | a\\|b | rated | zero | 78 | 0.906 [0.800, 0.940] | - | - |" in text
    with pytest.raises(ValueError, match="python -m train evaluate"):
        read_results(tmp_path / "nowhere")


def test_the_card_has_what_its_publisher_says(made: SimpleNamespace, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("### Data\n\nLibriSpeech, CC BY 4.0.\n")
    options = ("--notes", notes, "--licence", "cc-by-4.0", "--out", tmp_path / "bundle")
    assert export(parsed("--model", made.out, *options)) == 0
    assert export(parsed("--model", tmp_path / "bundle", "--out", tmp_path / "again")) == 0
    text = (tmp_path / "again" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "cc-by-4.0"
    assert "LibriSpeech, CC BY 4.0." in text and "fill in" not in text
    with pytest.raises(UserError, match="no such file"):
        export(parsed("--model", made.out, "--notes", tmp_path / "no.md", "--out", tmp_path / "b"))


def parsed(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--int8",), "--int8 needs real clips"),
        (("--calibrate", "x"), "give --int8 too"),
        (("--web", "x"), "npm install onnxruntime-web"),
        (("--web", "x", "--onnxruntime-web", "nowhere"), r"no ort\.wasm\.bundle\.min\.mjs"),
        (("--web-int8",), "--web-int8 needs"),
        (("--model", "mfcc"), "only students are exported"),
        (("--model", "nowhere"), "no such model"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(parsed("--out", tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


def test_an_export_does_not_overwrite_its_model(made: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="give another --out"):
        export(parsed("--model", made.out, "--out", made.out))
    bundle.verify(made.out)


def test_a_bundle_exported_again_keeps_where_it_came_from(made: SimpleNamespace) -> None:
    for model in (str(made.out), made.out.as_uri()):
        again = open_source(model).about
        assert again["made_from"]["model"] == "run" and again["recipe_hash"] == "abc"


def test_files_that_are_no_export(tmp_path: Path, made: SimpleNamespace) -> None:
    import onnx

    with pytest.raises(ValueError, match="no such file"):
        OnnxScorer(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(ValueError, match="not an ONNX file"):
        OnnxScorer(tmp_path / "model.onnx")
    model = onnx.load(str(made.out / "model.onnx"))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ValueError, match="its metadata lacks model"):
        OnnxScorer(tmp_path / "model.onnx")


def test_clips_come_to_16_khz_as_the_student_hears_them(tmp_path: Path) -> None:
    wave_T = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave_T, 48_000, subtype="FLOAT")
    for resampler in get_args(Resampler):
        (found,) = read_clips(tmp_path, 1, resampler)
        np.testing.assert_array_equal(found[:16_000], to_16k(wave_T, 48_000, resampler))
        student = Student(variant("v1").model_copy(update={"resampler": resampler}))
        assert StudentEncoder(student).resampler == resampler


def test_clips_of_shards_of_a_table_and_of_a_folder(made: SimpleNamespace) -> None:
    assert len(read_clips(made.shards, 100)) == 8
    for source in (made.rated, made.rated.parent):
        found = read_clips(source, 4)
        assert len(found) == 4
        assert all(wave.shape == (122_880,) and wave.dtype == np.float32 for wave in found)
    with pytest.raises(ValueError, match="give a folder of shards"):
        read_clips(made.top / "nowhere", 4)
    (made.top / "empty").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="no audio file"):
        read_clips(made.top / "empty", 4)
    with pytest.raises(ValueError, match="need at least 1"):
        read_clips(made.rated, 0)
