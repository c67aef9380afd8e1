"""External scorers: what is loaded, what is said where one cannot be had, one clip that fails."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from tests.tolerance import STUDENT
from tests.train_helpers import needs_shared, tone_pcm
from train.audio import read_mono, to_16k
from train.evaluation import external_scorers
from train.evaluation.external_scorers import (
    EXTERNAL,
    ExternalScorer,
    Options,
    load_external,
    outputs_named,
)
from train.evaluation.records import Unavailable

RATE = 16_000


def wave(seconds=2.0, number=0):
    return tone_pcm(number, int(seconds * RATE)).astype(np.float32) / 32768


def loaded(name, **options):
    return load_external(name, EXTERNAL[name].outputs, Options(**options))


class Mean(nn.Module):
    """Says the mean of what it hears, with one parameter."""

    def __init__(self, values=1):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.values, self.scored = values, []

    def forward(self, *waves):
        self.scored += list(waves)
        mean_1 = self.scale * waves[0].mean(dim=-1)
        return mean_1 if self.values == 1 else [mean_1 + n for n in range(self.values)]


def test_names_ask_for_a_scorer_for_all_of_a_kind_or_for_one_number():
    def names(name):
        return [(family, [o.name for o in outputs]) for family, outputs in outputs_named(name)]

    assert names("dnsmos-p808") == [("dnsmos", ["dnsmos-p808"])]
    assert [o for _, found in names("dnsmos") for o in found] == [
        *("dnsmos-p808", "dnsmos-p835", "dnsmos-p835-sig", "dnsmos-p835-bak")
    ]
    assert [family for family, _ in names("squim")] == ["squim-objective", "squim-subjective"]
    assert names("v7") == names("xlsr-2b-l10") == names("runs/real/model") == []


def test_output_names_are_unique_and_every_scorer_says_how_it_is_had():
    names = [output.name for known in EXTERNAL.values() for output in known.outputs]
    assert len(names) == len(set(names))
    assert all(known.get and known.clips and known.about for known in EXTERNAL.values())


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *(("distillmos", "distillmos.sqa"), ("dnsmos", "speechmos.dnsmos")),
        *(("dnsmos", "onnxruntime"), ("nisqa", "torchmetrics.functional.audio.nisqa")),
        *(("nisqa", "librosa"), ("squim-objective", "torchaudio.pipelines")),
        ("utmos", "utmos_pytorch"),
    ],
)
def test_a_missing_package_is_named_with_what_would_get_it(monkeypatch, name, module):
    real = importlib.import_module

    def without(wanted, *rest):
        if wanted == module:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(wanted, *rest)

    if name == "nisqa":
        fake = SimpleNamespace(_load_nisqa_model=lambda: (Mean(), {}))
        monkeypatch.setitem(sys.modules, "torchmetrics.functional.audio.nisqa", fake)
    monkeypatch.setattr(external_scorers.importlib, "import_module", without)
    assert loaded(name) == Unavailable(
        name, f"the package {module} is not installed", EXTERNAL[name].get
    )


@pytest.mark.parametrize("name", ["squim-objective", "utmos", "nisqa"])
def test_without_a_network_the_reason_is_said(monkeypatch, name):
    def refuse(*_, **__):
        raise OSError("Name or service not known\nmore")

    fakes = {
        "utmos_pytorch": SimpleNamespace(UTMOSScoreTorch=refuse),
        "torchmetrics.functional.audio.nisqa": SimpleNamespace(_load_nisqa_model=refuse),
    }
    for module, fake in fakes.items():
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(
        "torchaudio.pipelines._squim_pipeline.SquimObjectiveBundle.get_model", refuse
    )
    assert loaded(name).reason.endswith("(OSError: Name or service not known)")


def test_squim_objective_as_torchaudio_loads_it(monkeypatch, tmp_path):
    # torchaudio's own loading code, on weights of its own network, drawn here.
    from torchaudio.models import squim_objective_base

    torch.manual_seed(0)
    network = squim_objective_base().eval()
    path = tmp_path / "squim.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setattr("torchaudio.utils._download_asset", lambda key: str(path))
    squim = loaded("squim-objective")
    wave_T = wave(1)
    with torch.inference_mode():
        stoi, pesq, si_sdr = (float(v) for v in network(torch.from_numpy(wave_T)[None]))
    assert squim.score(wave_T, RATE) == pytest.approx(
        {"squim-stoi": stoi, "squim-pesq": pesq, "squim-si-sdr": si_sdr}, rel=1e-4, abs=STUDENT
    )
    assert squim.parameters > 7_000_000 and len(squim.weights_sha256) == 64
    assert not any(output.mos_scale for output in squim.outputs)


def test_squim_subjective_compares_with_clean_speech(monkeypatch, tmp_path):
    network = Mean()
    bundle = SimpleNamespace(get_model=lambda: network)
    monkeypatch.setattr("torchaudio.pipelines.SQUIM_SUBJECTIVE", bundle)
    assert loaded("squim-subjective").reason.startswith("it compares with a recording of clean")
    clean = tmp_path / "clean.wav"
    soundfile.write(clean, wave(1, 3), RATE, subtype="FLOAT")
    squim = loaded("squim-subjective", clean_speech=clean)
    assert squim.score(wave(), RATE)["squim-mos"] == pytest.approx(float(wave().mean()))
    assert np.array_equal(network.scored[1][0].numpy(), wave(1, 3))


def test_utmos_hears_16_khz(monkeypatch):
    network = Mean()
    network.score = network.forward
    monkeypatch.setitem(
        sys.modules, "utmos_pytorch", SimpleNamespace(UTMOSScoreTorch=lambda device: network)
    )
    monkeypatch.setattr(external_scorers.importlib.metadata, "version", lambda package: "1.0")
    utmos = loaded("utmos")
    utmos.score(wave(1), 8000)
    assert network.scored[0].shape == (1, 32_000)
    assert utmos.version.startswith("utmos-pytorch 1.0, ") and utmos.parameters == 1


NISQA_ARGS = {
    **{"cnn_pool_1": [24, 7], "cnn_pool_2": [12, 5], "cnn_pool_3": [6, 3], "cnn_dropout": 0.2},
    **{"cnn_kernel_size": (3, 3), "cnn_c_out_1": 16, "cnn_c_out_2": 32, "cnn_c_out_3": 64},
    **{"td_sa_d_model": 64, "td_sa_nhead": 1, "td_sa_num_layers": 2, "td_sa_h": 64},
    **{"td_sa_dropout": 0.1, "pool_att_h": 128, "pool_att_dropout": 0.1},
    **{"ms_seg_length": 15, "ms_seg_hop_length": 4, "ms_max_segments": 1300, "ms_sr": None},
    **{"ms_n_fft": 4096, "ms_hop_length": 0.01, "ms_win_length": 0.02, "ms_n_mels": 48},
    "ms_fmax": 20_000,
}


def test_nisqa_as_torchmetrics_runs_it(monkeypatch, tmp_path):
    # The real code around NISQA's network, whose weights are drawn here.
    nisqa = pytest.importorskip("torchmetrics.functional.audio.nisqa")
    pytest.importorskip("librosa")
    torch.manual_seed(0)
    content = {"args": NISQA_ARGS, "model_state_dict": nisqa._NISQADIM(NISQA_ARGS).state_dict()}
    torch.save(content, tmp_path / "nisqa.tar")
    monkeypatch.setattr(nisqa, "NISQA_DIR", str(tmp_path))
    nisqa._load_nisqa_model.cache_clear()
    found = loaded("nisqa")
    wave_T = torch.from_numpy(wave(1))
    expected_5 = nisqa.non_intrusive_speech_quality_assessment(wave_T, 48_000)
    assert found.score(wave(1), 48_000) == {"nisqa": float(expected_5[0])}
    with pytest.raises(ValueError, match="nisqa: RuntimeError"):
        found.score(wave(60), RATE)  # longer than it takes
    nisqa._load_nisqa_model.cache_clear()


def test_distillmos_is_the_packages_network_and_repeats_v7():
    from train.scoring.score import load

    other = loaded("distillmos")
    said = other.score(wave(2), RATE)["distillmos"]
    assert said == pytest.approx(load("v7").score(wave(2), RATE), abs=STUDENT)
    assert other.weights_sha256 == load("v7").weights_sha256
    assert other.parameters == 4_133_226


@needs_shared
def test_dnsmos_is_the_packages_own(shared):
    dnsmos = pytest.importorskip("speechmos.dnsmos")
    wave_T, rate = read_mono(min((shared / "data/mos/p835ref_nb").glob("*.flac")))
    expected = dnsmos.run(np.clip(to_16k(wave_T, rate), -1, 1), RATE)
    said = loaded("dnsmos").score(wave_T, rate)
    for output in EXTERNAL["dnsmos"].outputs:
        assert said[output.name] == pytest.approx(expected[output.key], abs=STUDENT)


def test_a_clip_that_a_scorer_fails_on_is_named(tmp_path):
    def scores(wave_T, rate):
        if wave_T.max() > 0.99:
            raise RuntimeError("too loud")
        return {"mos": np.nan if len(wave_T) < 100 else 3.0}

    known = EXTERNAL["utmos"]
    scorer = ExternalScorer("utmos", known, known.outputs, "0", None, "v", scores)
    made = {"good": wave(1), "loud": np.ones(RATE), "short": wave(1)[:50]}
    for name, wave_T in made.items():
        soundfile.write(tmp_path / f"{name}.wav", wave_T, RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no audio")
    paths = [tmp_path / f"{name}.wav" for name in (*made, "text")]
    good, loud, short, text = scorer.score_files(paths, "own")
    assert good == {"utmos": 3.0}
    assert "loud.wav: utmos: RuntimeError: too loud" in loud
    assert "short.wav" in short and "not finite" in short
    assert "text.wav" in text
