"""Kokoro and Piper: tiny networks of the real interface made here; the real ones where they are."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
from onnx import TensorProto, helper

from data_specs.corpus import find_corpus
from data_specs.io.errors import UserError
from data_specs.io.onnx_session import cpu_session
from data_specs.voice import VoiceModel, VoiceSpec, load_voices, sentences
from data_specs.weight import all_weights
from pipeline.__main__ import main
from pipeline.corpora import onnx_voices, speak
from pipeline.corpora.manifest import scan
from train.models.weights import FOLDER_VARIABLE, state_of

KOKORO = {"engine": "kokoro", "name": "kokoro-82m", "licence": "Apache-2.0"}
PIPER = {"engine": "piper", "name": "tiny", "languages": ["en"], "licence": "CC0-1.0"}
VOICES = ("af_heart", "bm_lewis", "ef_dora", "ff_siwis", "jf_alpha")


def kokoro(*languages: str, **changes: object) -> VoiceModel:
    return VoiceModel.model_validate(KOKORO | {"languages": languages} | changes)


def save_network(path: Path, nodes: list, inputs: dict[str, tuple[int, list]], output: str) -> None:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *form) for name, form in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(np.array([6000], np.int64), "length"),
            onnx.numpy_helper.from_array(np.array([0], np.int64), "zero"),
            onnx.numpy_helper.from_array(np.array([1, -1], np.int64), "row"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, path)


def save_kokoro(folder: Path) -> None:
    """What ``make voices`` puts together, small: a level for each token, as loud as the style."""
    folder.mkdir(parents=True)
    nodes = [
        helper.make_node("Cast", ["tokens"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["style"], ["loud"], keepdims=0),
        helper.make_node("Div", ["loud", "speed"], ["gain"]),
        helper.make_node("Mul", ["float", "gain"], ["row_wave"]),
        helper.make_node("Sin", ["row_wave"], ["short"]),
        helper.make_node("Resize", ["short", "", "scales"], ["long"], mode="nearest"),
        helper.make_node("Squeeze", ["long", "zero"], ["audio"]),
    ]
    scales = helper.make_tensor("value", TensorProto.FLOAT, [2], [1.0, 2400.0])
    nodes.insert(0, helper.make_node("Constant", [], ["scales"], value=scales))
    inputs = {
        "tokens": (TensorProto.INT64, [1, None]),
        "style": (TensorProto.FLOAT, [1, 256]),
        "speed": (TensorProto.FLOAT, [1]),
    }
    save_network(folder / "kokoro-v1.0.int8.onnx", nodes, inputs, "audio")
    rng = np.random.default_rng(0)
    styles = {name: rng.random((510, 1, 256), np.float32) for name in VOICES}
    np.savez(folder / "voices-v1.0.npz", **styles)
    letters = "abcdefghijklmnopqrstuvwxyzç "
    (folder / "config.json").write_text(
        json.dumps({"vocab": {c: i for i, c in enumerate(letters)}})
    )


def save_piper(folder: Path, name: str = "tiny") -> None:
    """A voice whose speech is the noise of two random nodes, as in a VITS, scaled."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = [
        helper.make_node("ConstantOfShape", ["length"], ["empty"]),
        helper.make_node("RandomNormalLike", ["empty"], ["first"], dtype=TensorProto.FLOAT),
        helper.make_node("RandomNormalLike", ["first"], ["second"], dtype=TensorProto.FLOAT),
        helper.make_node("Add", ["first", "second"], ["sum"]),
        helper.make_node("ReduceMean", ["scales"], ["scale"], keepdims=0),
        helper.make_node("Mul", ["sum", "scale"], ["wave"]),
        helper.make_node("Reshape", ["wave", "row"], ["output"]),
    ]
    inputs = {
        "input": (TensorProto.INT64, [1, None]),
        "input_lengths": (TensorProto.INT64, [1]),
        "scales": (TensorProto.FLOAT, [3]),
    }
    save_network(folder / f"{name}.onnx", nodes, inputs, "output")
    config = {
        "audio": {"sample_rate": 22050},
        "espeak": {"voice": "en-us"},
        "phoneme_type": "espeak",
        "phoneme_id_map": {c: [i] for i, c in enumerate("_^$ abcdefghijklmnopqrstuvwxyz")},
        "num_symbols": 30,
        "num_speakers": 1,
        "inference": {"noise_scale": 0.667, "length_scale": 1, "noise_w": 0.8},
    }
    (folder / f"{name}.onnx.json").write_text(json.dumps(config))


class Spelling:
    """Stands for espeak-ng: a text's own letters."""

    def phonemize(self, voice: str, text: str) -> list[list[str]]:
        return [list(text.lower())]


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of weights with both; phonemes and versions without the package."""
    home = tmp_path / "weights"
    save_kokoro(home / "kokoro")
    save_piper(home / "piper")
    monkeypatch.setenv(FOLDER_VARIABLE, str(home))
    monkeypatch.setattr(onnx_voices, "_espeak", Spelling)
    monkeypatch.setattr(onnx_voices, "require_package", lambda *_: "1")
    return home


def clips(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.*"))
        if path.suffix in (".flac", ".json", ".jsonl")
    }


# --- the spec -------------------------------------------------------------------------------------


def test_the_open_voices_have_sentences_licences_and_engines() -> None:
    spec = load_voices("open")
    assert spec.languages == ["en", "es", "fr", "hi", "it", "pt"]
    for model in spec.models:
        assert model.engine in speak.ENGINES and not model.noncommercial
        assert model.licence == all_weights()[model.engine].licence
    for language in spec.languages:
        said = sentences(spec.texts)[language]
        assert len(set(said)) == len(said) >= 40
        words = [len(text.split()) for text in said]
        assert min(words) <= 4 and max(words) >= 18, language
        assert {text[-1] for text in said} <= set(".?!।")


def test_a_language_stands_once_with_a_model_and_a_name_is_a_file_s() -> None:
    models = [KOKORO | {"languages": ["en", "es"]}, KOKORO | {"languages": ["es"]}]
    with pytest.raises(ValueError, match=r"kokoro-82m \(es\) is there more than once"):
        VoiceSpec.model_validate({"name": "a", "models": models})
    with pytest.raises(ValueError, match=r"piper has names a file's, without its ending"):
        VoiceModel.model_validate(PIPER | {"name": "../en_US-joe-medium"})
    with pytest.raises(ValueError, match="coqui has names like tts_models/en/vctk/vits"):
        VoiceModel.model_validate(KOKORO | {"engine": "coqui", "languages": ["en"]})


# --- what is missing is named before anything is said ---------------------------------------------


@pytest.mark.parametrize("engine", ["kokoro", "piper"])
def test_a_missing_package_is_named_before_anything_is_said(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    spec = tmp_path / "v.yaml"
    model = PIPER if engine == "piper" else KOKORO | {"languages": ["en"]}
    spec.write_text(json.dumps({"name": "v", "models": [model]}))
    assert main(["speak", str(spec), "--out", str(tmp_path / "out"), "--clips", "2"]) == 2
    told = capsys.readouterr().err
    assert "piper-tts is not installed: run make setup" in told and "[voices]" in told
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named_with_what_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(onnx_voices, "require_package", lambda *_: "1")
    with pytest.raises(UserError, match=rf"no weights 'kokoro' in {tmp_path}.*: run make voices"):
        onnx_voices.check_kokoro(kokoro("en"), "v.yaml: models[0]")
    with pytest.raises(UserError, match=r"no tiny\.onnx in .*piper: run make voices, or put"):
        onnx_voices.check_piper(VoiceModel.model_validate(PIPER), "v.yaml: models[0]")


def test_what_kokoro_is_not_is_told_by_its_place(at_home: Path) -> None:
    onnx_voices.check_kokoro(kokoro("en", "pt"), "v.yaml: models[0]")
    with pytest.raises(UserError, match=r"v\.yaml: models\[0\]\.languages: .*en, .*, not ja"):
        onnx_voices.check_kokoro(kokoro("en", "ja"), "v.yaml: models[0]")
    with pytest.raises(UserError, match=r"models\[0\]\.licence: .*'Apache-2.0', not 'MIT'"):
        onnx_voices.check_kokoro(kokoro("en", licence="MIT"), "v.yaml: models[0]")


# --- tiny networks --------------------------------------------------------------------------------


def test_tiny_kokoro_speaks_by_text_speaker_and_seed(at_home: Path) -> None:
    engine = onnx_voices.Kokoro(kokoro("en", "fr"))
    assert list(engine.speakers("en")) == ["af_heart", "bm_lewis"]
    assert list(engine.speakers("fr")) == ["ff_siwis"]
    wave = engine.say("good morning", "af_heart", None, seed=2**63 - 1)
    assert wave.dtype == np.float32 and wave.ndim == 1 and np.isfinite(wave).all()
    assert np.array_equal(wave, engine.say("good morning", "af_heart", None, seed=2**63 - 1))
    for other in (("good evening", "af_heart", 1), ("good morning", "bm_lewis", 2**63 - 1)):
        assert not np.array_equal(wave, engine.say(*other[:2], None, seed=other[2]))
    assert not np.array_equal(wave, engine.say("good morning", "af_heart", None, seed=3))
    for text in ("", "1234", "a" * 511):
        with pytest.raises(ValueError, match=r"\d+ phonemes, of at most 510"):
            engine.say(text, "af_heart", None, seed=0)


def test_half_a_second_of_silence_at_both_ends_is_cut_to_a_tenth(at_home: Path) -> None:
    silence, tone = np.zeros(12_000, np.float32), np.full(24_000, 0.5, np.float32)
    wave = onnx_voices._trimmed(np.concatenate([silence, tone, silence]))
    assert len(wave) == 24_000 + 2 * 2_400 - 1
    assert len(onnx_voices._trimmed(silence)) == len(silence)


def test_a_network_s_noise_is_its_input(tmp_path: Path) -> None:
    save_piper(tmp_path)
    network, names = onnx_voices.with_noise_inputs(tmp_path / "tiny.onnx")
    assert names == ["noise_0", "noise_1"]
    session = cpu_session(network, threads=1)
    rng = np.random.default_rng(0)
    noises = {n: rng.standard_normal(onnx_voices.MOST_NOISE, np.float32) for n in names}
    fed = {
        "input": np.zeros((1, 3), np.int64),
        "input_lengths": np.array([3], np.int64),
        "scales": np.full(3, 0.5, np.float32),
    }
    said = session.run(None, fed | noises)[0]
    expected = (noises["noise_0"][:6000] + noises["noise_1"][:6000]) / 2
    assert said.shape == (1, 6000)
    assert np.allclose(said[0], expected, atol=1e-6)  # one addition and one product in float32
    assert np.array_equal(said, session.run(None, fed | noises)[0])


def test_tiny_corpus_is_resumed_and_scanned_with_speaker_language_and_licence(
    at_home: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "v.yaml"
    models = [
        KOKORO | {"languages": ["en", "fr"], "weight": 2},
        KOKORO | {"languages": ["es"], "weight": 1},
    ]
    values = {"name": "v", "seed": 4, "min_seconds": 0, "texts": "sentences_open", "models": models}
    spec.write_text(json.dumps(values))
    for clips_asked in (5, 16):  # a longer corpus only adds
        out = str(tmp_path / "grown")
        assert main(["speak", str(spec), "--out", out, "--clips", str(clips_asked)]) == 0
    assert main(["speak", str(spec), "--out", str(tmp_path / "whole"), "--clips", "16"]) == 0
    assert clips(tmp_path / "grown") == clips(tmp_path / "whole")
    corpus = find_corpus("open_voices", "here")
    rows = scan("open_voices", corpus, [tmp_path / "whole"]).usable.to_pylist()
    assert len(rows) == 16 and {row["licence"] for row in rows} == {"Apache-2.0"}
    assert {(row["language"], row["speaker"]) for row in rows} == {
        ("en", "kokoro-82m/af_heart"),
        ("en", "kokoro-82m/bm_lewis"),
        ("es", "kokoro-82m/ef_dora"),
        ("fr", "kokoro-82m/ff_siwis"),
    }
    records = [json.loads(line) for line in (tmp_path / "whole/clips.jsonl").open(encoding="utf-8")]
    assert {record["licence"] for record in records} == {"Apache-2.0"}
    assert {record["text"] for record in records} <= {
        text for texts in sentences("sentences_open").values() for text in texts
    }


def test_tiny_piper_says_the_same_whatever_it_said_before(at_home: Path) -> None:
    pytest.importorskip("piper")
    engine = onnx_voices.Piper(VoiceModel.model_validate(PIPER))
    assert engine.rate_hz == 22_050 and not engine.speakers("en")
    wave = engine.say("Good morning.", None, None, seed=1)
    other = engine.say("Good morning.", None, None, seed=2)
    assert wave.shape == other.shape == (6000,) and np.abs(wave - other).max() > 0.1
    assert np.array_equal(wave, engine.say("Good morning.", None, None, seed=1))


def test_a_piper_voice_of_other_phonemes_is_refused(at_home: Path) -> None:
    pytest.importorskip("piper")
    path = at_home / "piper/tiny.onnx.json"
    path.write_text(path.read_text().replace('"phoneme_type": "espeak"', '"phoneme_type": "text"'))
    with pytest.raises(UserError, match=r"tiny\.onnx\.json: only voices with espeak-ng's phonemes"):
        onnx_voices.Piper(VoiceModel.model_validate(PIPER))


# --- the real ones --------------------------------------------------------------------------------


def test_phonemes_are_espeak_s_and_all_in_kokoro_s_vocabulary() -> None:
    pytest.importorskip("piper")
    assert onnx_voices._phonemes("en-us", "The soup is hot, is it not?") == [
        "ðə sˈuːp ɪz hˈɑːt, ɪz ɪt nˈɑːt?"
    ]
    assert onnx_voices._phonemes("de", "Ich")[0].endswith("ɪç")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["kokoro", "piper"])
def test_the_real_voices_speak_well_and_loud_enough(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("piper")
    from train.scoring.score import load

    name, entry = engine, all_weights()[engine]
    if state_of(name, entry).problem:
        pytest.skip(f"the weights {name!r} are not here: make voices brings them")
    spec = load_voices("open")
    models = [model for model in spec.models if model.engine == engine]
    order = speak.Order(spec, tmp_path, {k: sentences(spec.texts)[k] for k in spec.languages})
    voice, teacher, scores = speak.ENGINES[engine](models[0], "cpu"), load("v7"), []
    for clip in (10, 12, 14):
        wave, path, record = speak.make_clip(order, models[0], voice, clip)
        again = speak.make_clip(order, models[0], voice, clip)[0]
        assert np.array_equal(wave, again), path
        assert 0.8 < record["seconds"] < 12 and np.abs(wave).max() == pytest.approx(0.9)
        assert -30 < 20 * np.log10(np.sqrt(np.mean(wave**2))) < -10
        soundfile.write(tmp_path / f"{clip}.wav", wave, 16_000)
        scores.append(teacher.score(wave.astype(np.float32), 16_000))
    # Measured: 4.4, 4.4, 4.7 of Kokoro; five of Piper's 3.6 to 4.6; flite has 2.6 to 3.1.
    assert np.mean(scores) > 3.3, scores
