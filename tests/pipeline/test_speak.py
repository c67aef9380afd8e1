"""Synthetic voices: the spec against the library's list, draws, resumption, failures by name.

Where a test's name says "random weights", the models are real VITS networks of the library, small,
with seeded random weights, in its own on-disk format and found by its own loader: what they say is
no speech. Where it says "fake engine", the library is not involved at all.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data_specs.corpus import find_corpus
from data_specs.io.errors import UserError
from data_specs.strict import SpecError
from data_specs.voice import NOT_STATED, VoiceModel, VoiceSpec, load_voices
from pipeline.__main__ import main
from pipeline.corpora import coqui, speak, texts
from pipeline.corpora.manifest import scan
from pipeline.corpora.voice_engine import Engine
from tests.conftest import ROOT
from tests.pipeline.conftest import hashes
from train.models.weights import cache_folder

LJ, VCTK, THORSTEN = (
    f"tts_models/{name}/vits" for name in ("en/ljspeech", "en/vctk", "de/thorsten")
)
YOUR_TTS = "tts_models/multilingual/multi-dataset/your_tts"
VCTK_SPEAKERS = ("p225", "p226", "ED\n")  # the published model has this newline, too


def voices(*names: str, **changes: object) -> VoiceSpec:
    licences = {YOUR_TTS: "CC BY-NC-ND 4.0"}
    models = [
        {
            "name": name,
            "languages": ["de" if "/de/" in name else "en"],
            "licence": licences.get(name, "apache 2.0"),
        }
        for name in names or (LJ, VCTK, THORSTEN)
    ]
    values = {"name": "small", "seed": 5, "min_seconds": 0, "models": models}
    return VoiceSpec.model_validate(values | changes)


def order(spec: VoiceSpec, out: Path) -> speak.Order:
    return speak.Order(spec, out, texts.parse_texts((), spec))


class FakeEngine:
    """Says noise whose pattern is its arguments; ``flaws`` are what its first sentences are."""

    rate_hz = 22_050
    languages: tuple[str, ...] = ()
    version = "fake 1"

    def __init__(self, speakers: tuple[str, ...] = (), flaws: tuple[float, ...] = ()) -> None:
        self.named, self.flaws = speakers, list(flaws)
        self.calls: list[tuple[str, str | None, str | None, int]] = []

    def speakers(self, language: str) -> tuple[str, ...]:
        return self.named

    def say(self, text: str, speaker: str | None, language: str | None, seed: int) -> np.ndarray:
        self.calls.append((text, speaker, language, seed))
        rng = np.random.default_rng([seed, len(text)])
        wave = 0.3 * rng.standard_normal(self.rate_hz).astype(np.float32)
        return wave * np.float32(self.flaws.pop(0)) if self.flaws else wave


# --- the spec and the library's list --------------------------------------------------------------


def test_the_seventeen_voices_are_as_the_library_lists_them() -> None:
    spec = load_voices("coqui")
    assert len(spec.models) == 17
    assert spec.languages == ["de", "en", "es", "fr", "pt"]
    for model in spec.models:
        coqui.check_listed(model, "coqui.yaml")
        entry = coqui.listed()[model.name]
        assert model.licence == (entry["license"] or NOT_STATED)
        assert model.vocoder == entry["default_vocoder"]
        assert not entry.get("tos_required") and not model.noncommercial
        assert model.languages == (model.name.split("/")[1],)


def test_an_unlisted_model_is_named_with_the_nearest() -> None:
    spec = voices("tts_models/en/ljspeech/vitz")
    with pytest.raises(
        SpecError, match=r"s\.yaml: models\[0\]\.name: .*vitz'; did you mean .*vits'"
    ):
        coqui.check_listed(spec.models[0], "s.yaml: models[0]")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "licence",
            "MIT",
            r"models\[0\]\.licence: the library's list says 'apache 2.0', not 'MIT'",
        ),
        ("vocoder_licence", "MIT", r"models\[0\]\.vocoder_licence: .* 'apache 2.0', not 'MIT'"),
        (
            "vocoder",
            "vocoder_models/a/b/c",
            r"models\[0\]\.vocoder: the library's default for .*v2'",
        ),
    ],
)
def test_what_the_list_says_otherwise_is_named(key: str, value: str, message: str) -> None:
    model = {
        "name": "tts_models/en/ljspeech/tacotron2-DDC",
        "languages": ["en"],
        "licence": "apache 2.0",
        "vocoder": "vocoder_models/en/ljspeech/hifigan_v2",
        "vocoder_licence": "apache 2.0",
    }
    coqui.check_listed(voices(models=[model]).models[0], "s.yaml: models[0]")
    with pytest.raises(SpecError, match=message):
        wrong = voices(models=[model | {key: value}]).models[0]
        coqui.check_listed(wrong, "s.yaml: models[0]")


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("CPML", True),
        ("CC BY-NC-ND 4.0", True),
        ("for research only", True),
        ("MPL", False),
        (NOT_STATED, False),
    ],
)
def test_noncommercial_licences_are_told_from_others(licence: str, expected: bool) -> None:
    model = {"name": LJ, "languages": ["en"], "licence": licence}
    assert voices(models=[model]).models[0].noncommercial is expected


def test_a_wrong_spec_is_told_by_its_place(tmp_path: Path) -> None:
    text = (ROOT / "data_specs" / "voices" / "coqui.yaml").read_text()
    path = tmp_path / "v.yaml"
    path.write_text(text.replace("languages: [pt]", "language: [pt]"))
    with pytest.raises(SpecError, match=r"v\.yaml: models\[16\]: .*'language'; did you mean 'lang"):
        load_voices(path)
    twice = text.replace("models/pt/cv/vits", "models/es/css10/vits").replace("[pt]", "[es]")
    path.write_text(twice)
    with pytest.raises(SpecError, match=r"tts_models/es/css10/vits \(es\) is there more than once"):
        load_voices(path)


def test_a_missing_library_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    coqui.listed.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="coqui-tts is not installed: run make setup"):
        coqui.listed()


# --- texts ----------------------------------------------------------------------------------------

LINES = """\
4#12\t- The captain never opened the letter.
4#13\tNo.
4#14\t[DOOR SLAMS] What was that noise outside?
We take plain lines with enough words too.
4#15\t\u266a And the band played on and on \u266a
4#16\tDer Zug  fährt um halb neun.
one two three four five six seven eight nine ten eleven twelve
"""


def test_lines_of_multisubs_and_plain_lines_are_sentences(tmp_path: Path) -> None:
    path = tmp_path / "en.sents.det"
    path.write_text("\ufeff" + LINES, encoding="utf-8")
    rule = voices(sentences={"max_words": 11}).sentences
    text = texts.TextFile(path, rule)
    assert [text[i] for i in range(len(text))] == [
        "The captain never opened the letter.",
        "We take plain lines with enough words too.",
        "Der Zug fährt um halb neun.",
    ]
    first = voices(sentences={"column": 3, "min_words": 2}).sentences
    assert texts.sentence_of("a\tb\tgood morning\n", first) == "good morning"
    assert texts.sentence_of("a\tgood morning\n", first) is None


def test_texts_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    spec = voices()
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("No.\nYes.\n")
    latin.write_bytes("Der Zug fährt um neun.\nSchöne Grüße".encode("latin-1"))
    for options, message in (
        ([f"en={empty}"], r"empty\.txt: no line is a sentence of 4 to 20 words"),
        ([f"en={latin}"], r"latin\.txt: line 1: not UTF-8"),
        (["en"], "--text en: write LANG=FILE"),
        (["fr=x"], "--text fr=x: unknown language 'fr'"),
    ):
        with pytest.raises(ValueError, match=message):
            texts.parse_texts(options, spec)
    with pytest.raises(FileNotFoundError):
        texts.parse_texts([f"en={tmp_path / 'none'}"], spec)


def test_a_language_without_texts_says_what_to_give(tmp_path: Path) -> None:
    models = [{"name": LJ, "languages": ["fi"], "licence": "apache 2.0"}]
    with pytest.raises(ValueError, match="no texts in language 'fi': give --text fi=FILE"):
        texts.parse_texts((), voices(models=models))
    path = tmp_path / "fi.txt"
    path.write_text("Juna lähtee kello kymmenen aamulla.\n")
    assert texts.parse_texts([f"fi={path}"], voices(models=models))["fi"][0].startswith("Juna")


# --- draws ----------------------------------------------------------------------------------------


def test_clips_are_shared_out_by_weight_and_whatever_their_number() -> None:
    models = [
        {"name": name, "languages": ["en"], "licence": "apache 2.0", "weight": weight}
        for name, weight in ((LJ, 1), (VCTK, 3))
    ]
    spec = voices(models=models)
    many = speak.models_of(spec, 4000)
    assert np.array_equal(speak.models_of(spec, 10), many[:10])
    assert 0.72 < np.mean(many == 1) < 0.78


def test_a_clip_of_a_fake_engine_is_the_same_alone_and_among_others(tmp_path: Path) -> None:
    spec = voices(VCTK, min_seconds=2.5)
    ordered = order(spec, tmp_path)

    def clip(number: int) -> tuple[bytes, str]:
        wave, path, record = speak.make_clip(
            ordered, spec.models[0], FakeEngine(VCTK_SPEAKERS), number
        )
        return wave.tobytes(), json.dumps([path, record])

    alone = clip(7)
    assert [clip(number) for number in range(10)][7] == alone
    assert clip(8) != alone


def test_speakers_and_texts_are_drawn_evenly_with_a_fake_engine(tmp_path: Path) -> None:
    spec = voices(VCTK)
    engine = FakeEngine(VCTK_SPEAKERS)
    paths = [
        speak.make_clip(order(spec, tmp_path), spec.models[0], engine, clip)[1]
        for clip in range(150)
    ]
    said = Counter(speaker for _, speaker, _, _ in engine.calls)
    assert set(said) == set(VCTK_SPEAKERS) and min(said.values()) > 30
    assert len({text for text, _, _, _ in engine.calls}) > 40
    assert len({seed for _, _, _, seed in engine.calls}) == 150
    folders = {path.split("/")[2] for path in paths}
    assert folders == {"p225", "p226", "ED"}


def test_a_multilingual_fake_engine_speaks_its_own_name_of_a_language(tmp_path: Path) -> None:
    models = [{"name": YOUR_TTS, "languages": ["pt", "en"], "licence": "CC BY-NC-ND 4.0"}]
    spec = voices(models=models)
    engine = FakeEngine()
    engine.languages = ("pt-br\n", "en")
    records = [
        speak.make_clip(order(spec, tmp_path), spec.models[0], engine, clip)[2]
        for clip in range(20)
    ]
    asked = [language for _, _, language, _ in engine.calls]
    assert {(r["language"], name) for r, name in zip(records, asked, strict=True)} == {
        ("pt", "pt-br\n"),
        ("en", "en"),
    }
    engine.languages = ("en",)
    with pytest.raises(speak.NoSpeech, match="does not speak 'pt', but en"):
        for clip in range(20):
            speak.make_clip(order(spec, tmp_path), spec.models[0], engine, clip)


def test_sentences_of_a_fake_engine_go_on_until_the_clip_is_long_enough(tmp_path: Path) -> None:
    spec = voices(LJ, min_seconds=3.5)
    engine = FakeEngine()
    wave, _, record = speak.make_clip(order(spec, tmp_path), spec.models[0], engine, 0)
    assert len(engine.calls) == 4 and len(wave) == 4 * 16_000
    assert record["text"] == " ".join(text for text, _, _, _ in engine.calls)
    assert record["seconds"] == 4.0 and np.abs(wave).max() == pytest.approx(0.9)


# --- failures -------------------------------------------------------------------------------------


def test_silent_and_broken_sentences_of_a_fake_engine_are_drawn_again(tmp_path: Path) -> None:
    spec = voices(LJ)
    engine = FakeEngine(flaws=(0.0, np.nan, 1e-5))
    wave, _, record = speak.make_clip(order(spec, tmp_path), spec.models[0], engine, 0)
    assert len(engine.calls) == 4 and record["text"] == engine.calls[3][0]
    assert np.isfinite(wave).all() and len(wave) == 16_000
    with pytest.raises(speak.NoSpeech, match="3 x silent, 1 x not finite"):
        engine = FakeEngine(flaws=(0.0, 0.0, np.nan, 0.0, 1.0))
        speak.make_clip(order(spec, tmp_path), spec.models[0], engine, 0)


def test_a_sentence_that_a_fake_engine_cannot_take_is_drawn_again(tmp_path: Path) -> None:
    class Stumbling(FakeEngine):
        def say(self, text, speaker, language, seed):
            if not self.calls:
                self.calls.append((text, speaker, language, seed))
                raise self.error
            return super().say(text, speaker, language, seed)

    spec, engine = voices(LJ), Stumbling()
    engine.error = RuntimeError("Kernel size can't be greater than actual input size")
    speak.make_clip(order(spec, tmp_path), spec.models[0], engine, 0)
    assert len(engine.calls) == 2
    for error in (RuntimeError("CUDA out of memory. Tried"), OSError("disk"), MemoryError()):
        engine = Stumbling()
        engine.error = error
        with pytest.raises(type(error)):  # the machine's trouble stops the run
            speak.make_clip(order(spec, tmp_path), spec.models[0], engine, 0)


def test_a_mute_or_missing_fake_model_fails_by_name_and_the_others_speak(tmp_path: Path) -> None:
    spec = voices()

    def load(model: VoiceModel) -> Engine:
        if model.name == VCTK:
            raise OSError("no network\nand more")
        return FakeEngine(flaws=(0.0,) * 1000 if model.name == THORSTEN else ())

    outcome = speak.speak(order(spec, tmp_path), 40, spec.models, load)
    ours = Counter(speak.models_of(spec, 40).tolist())
    assert outcome.made == ours[0] > 5
    assert outcome.failed_models == {
        VCTK: "no network",
        THORSTEN: "none of 3 clips came out: 4 x silent",
    }
    assert set(outcome.failed_clips.values()) == {f"{THORSTEN}: 4 x silent"}
    assert len(outcome.failed_clips) == 3
    assert len((tmp_path / speak.MANIFEST).read_text().splitlines()) == ours[0]


def test_noncommercial_models_are_left_out_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    spec = voices(LJ, YOUR_TTS)
    assert [model.name for model in speak.choose_models(spec, (), False)] == [LJ]
    told = capsys.readouterr().out
    assert told.startswith(f"left out: {YOUR_TTS}: CC BY-NC-ND 4.0; --allow-noncommercial")
    assert len(speak.choose_models(spec, (), True)) == 2
    assert [model.name for model in speak.choose_models(spec, (YOUR_TTS,), True)] == [YOUR_TTS]
    with pytest.raises(
        ValueError, match="--models: unknown model 'tts_models/en/lj/vits'; did you"
    ):
        speak.choose_models(spec, ("tts_models/en/lj/vits",), False)


def test_terms_are_never_agreed_to_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTS_HOME", str(tmp_path))
    monkeypatch.delenv("COQUI_TOS_AGREED", raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the keyboard"))
    with pytest.raises(UserError, match="set COQUI_TOS_AGREED=1"):
        coqui.load_coqui(voices("tts_models/multilingual/multi-dataset/xtts_v2").models[0])
    assert "COQUI_TOS_AGREED" not in os.environ and not list(tmp_path.iterdir())


def test_a_cut_off_download_names_the_folder_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tts" / LJ.replace("/", "--")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("TTS_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"Model file not found.*cut off, remove {folder}"):
        coqui.load_coqui(voices(LJ).models[0])
    assert os.environ["TTS_HOME"] == str(tmp_path)


# --- real networks, random weights ----------------------------------------------------------------


def save_vits(folder: Path, seed: int, speakers: tuple[str, ...] = ()) -> None:
    """A small VITS of the library with random weights, in its on-disk format."""
    from TTS.tts.configs.shared_configs import CharactersConfig
    from TTS.tts.configs.vits_config import VitsArgs, VitsConfig
    from TTS.tts.models.vits import Vits

    folder.mkdir(parents=True)
    (folder / "speaker_ids.json").write_text(json.dumps({n: i for i, n in enumerate(speakers)}))
    size = VitsArgs(
        hidden_channels=8,
        hidden_channels_ffn_text_encoder=8,
        num_layers_text_encoder=1,
        num_layers_posterior_encoder=1,
        num_layers_flow=1,
        resblock_kernel_sizes_decoder=[3],
        resblock_dilation_sizes_decoder=[[1, 3, 5]],
        upsample_initial_channel_decoder=16,
        upsample_rates_decoder=[16, 16],
        upsample_kernel_sizes_decoder=[32, 32],
        init_discriminator=False,
        use_speaker_embedding=bool(speakers),
        speaker_embedding_channels=4,
        speakers_file=str(folder / "speaker_ids.json") if speakers else None,
    )
    characters = CharactersConfig(
        characters_class="TTS.tts.models.vits.VitsCharacters",
        pad="_",
        characters="abcdefghijklmnopqrstuvwxyzäöüß",
        punctuations="!,.? '",
        phonemes="",
    )
    config = VitsConfig(
        model_args=size, use_phonemes=False, text_cleaner="basic_cleaners", characters=characters
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = Vits(config).state_dict()
    torch.save({"model": state}, folder / "model_file.pth")
    config.save_json(folder / "config.json")


@pytest.fixture(scope="module")
def vits_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tts_home")
    for seed, (name, speakers) in enumerate({LJ: (), VCTK: VCTK_SPEAKERS, THORSTEN: ()}.items()):
        save_vits(home / "tts" / name.replace("/", "--"), seed, speakers)
    return home


@pytest.fixture
def at_home(vits_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TTS_HOME", str(vits_home))
    return vits_home


def test_random_weights_vits_says_the_same_again_and_moves_no_random_state(at_home: Path) -> None:
    state = torch.get_rng_state()
    engine = coqui.load_coqui(voices(VCTK).models[0])
    assert (engine.rate_hz, engine.speakers("en")) == (22_050, list(VCTK_SPEAKERS))
    say = partial(engine.say, "We missed the last bus.", language=None)
    wave = say("p225", seed=3)
    assert wave.dtype == np.float32 and np.isfinite(wave).all() and np.abs(wave).max() > 0.01
    assert np.array_equal(wave, say("p225", seed=3))
    assert not np.array_equal(wave[:10_000], say("p225", seed=4)[:10_000])
    assert not np.array_equal(wave[:10_000], say("p226", seed=3)[:10_000])
    assert torch.equal(state, torch.get_rng_state())


def test_random_weights_corpus_is_scanned_with_speakers_and_languages(
    at_home: Path, tmp_path: Path
) -> None:
    spec = voices(min_seconds=1.0)
    outcome = speak.speak(order(spec, tmp_path), 24, spec.models, coqui.load_coqui)
    assert (outcome.made, outcome.kept) == (24, 0)
    assert not outcome.failed_models and not outcome.failed_clips
    manifest = scan("coqui_voices", find_corpus("coqui_voices", "here"), [tmp_path])
    rows = manifest.usable.to_pylist()
    assert len(rows) == 24 and {row["sample_rate_hz"] for row in rows} == {16_000}
    assert {(row["language"], row["speaker"]) for row in rows} == {
        ("en", "tts_models--en--ljspeech--vits/single"),
        ("en", "tts_models--en--vctk--vits/p225"),
        ("en", "tts_models--en--vctk--vits/p226"),
        ("en", "tts_models--en--vctk--vits/ED"),
        ("de", "tts_models--de--thorsten--vits/single"),
    }
    records = [json.loads(line) for line in (tmp_path / speak.MANIFEST).open(encoding="utf-8")]
    assert [record["path"] for record in records] == [row["path"] for row in rows]
    for record, row in zip(records, rows, strict=True):
        assert record["seconds"] == pytest.approx(row["frames"] / 16_000, abs=1e-4)
        assert record["licence"] == "apache 2.0" and record["made_by"].startswith("coqui-tts 0.")
        assert len(record["text"].split()) >= 4


@pytest.fixture(scope="module")
def uninterrupted(vits_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTS_HOME", str(vits_home))
        speak.speak(order(voices(), out), 16, voices().models, coqui.load_coqui)
    return hashes(out)


@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_random_weights_corpus_interrupted_and_run_again_is_the_same(
    at_home: Path,
    tmp_path: Path,
    uninterrupted: dict[str, str],
    after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, left = voices(), after
    write = speak.write_flac

    def interrupted(path: Path, wave: np.ndarray) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        write(path, wave)

    monkeypatch.setattr(speak, "write_flac", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speak.speak(order(spec, tmp_path), 16, spec.models, coqui.load_coqui)
    assert len(list(tmp_path.rglob("*.flac"))) == after
    assert len((tmp_path / speak.MANIFEST).read_text().splitlines()) == after
    monkeypatch.setattr(speak, "write_flac", write)
    # as a kill leaves it
    (tmp_path / f".clips.jsonl.{socket.gethostname()}.4194305.0a1b2c3d.tmp").touch()
    outcome = speak.speak(order(spec, tmp_path), 16, spec.models, coqui.load_coqui)
    assert (outcome.made, outcome.kept) == (16 - after, after)
    assert hashes(tmp_path) == uninterrupted


@pytest.mark.slow
def test_random_weights_corpus_killed_and_run_again_is_the_same(
    at_home: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "small.yaml"
    spec.write_text(json.dumps(voices().model_dump(mode="json")))

    def command(out: str) -> list[str]:
        return ["speak", str(spec), "--out", str(tmp_path / out), "--clips", "40"]

    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *command("killed")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list((tmp_path / "killed").rglob("*.flac")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(list((tmp_path / "killed").rglob("*.flac"))) < 40
    assert main(command("killed")) == main(command("whole")) == 0
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_random_weights_corpus_grows_by_files_only(
    at_home: Path, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    spec = voices()
    speak.speak(order(spec, tmp_path), 7, spec.models[1:], coqui.load_coqui)  # two of the models
    part = {name: value for name, value in hashes(tmp_path).items() if name.endswith(".flac")}
    assert 0 < len(part) < 7 and part.items() < uninterrupted.items()
    speak.speak(order(spec, tmp_path), 16, spec.models, coqui.load_coqui)
    assert hashes(tmp_path) == uninterrupted


def test_another_seed_spec_or_text_never_mixes_in(tmp_path: Path) -> None:
    def load(model: VoiceModel) -> Engine:
        return FakeEngine()

    spec, out = voices(LJ), tmp_path / "out"
    speak.speak(order(spec, out), 1, spec.models, load)
    text = tmp_path / "en.txt"
    text.write_text("This is another sentence to say.\n")
    other_text = speak.Order(spec, out, texts.parse_texts([f"en={text}"], spec))
    others = [order(voices(LJ, **change), out) for change in ({"seed": 6}, {"min_seconds": 2})]
    before = hashes(out)
    for other in (*others, other_text):
        with pytest.raises(ValueError, match=r"made-by\.json: made with .* another --out or seed"):
            speak.speak(other, 1, spec.models, load)
    assert hashes(out) == before
    speak.speak(order(voices(LJ, about="the same, described"), out), 1, spec.models, load)


def test_random_weights_command_tells_what_failed_and_makes_the_rest(
    vits_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "home" / "tts"
    home.mkdir(parents=True)
    for name in (LJ, THORSTEN):
        (home / name.replace("/", "--")).symlink_to(vits_home / "tts" / name.replace("/", "--"))
    (home / VCTK.replace("/", "--")).mkdir()
    monkeypatch.setenv("SPEECH_WEIGHTS", str(tmp_path / "home"))
    monkeypatch.setenv("TTS_HOME", "")
    monkeypatch.delenv("TTS_HOME")
    spec = tmp_path / "small.yaml"
    spec.write_text(json.dumps(voices().model_dump(mode="json")))
    argv = ["speak", str(spec), "--out", str(tmp_path / "out"), "--clips", "12"]
    assert main(argv) == 1
    told = capsys.readouterr().out
    assert f"failed: {VCTK}: [!] Model file not found" in told
    assert os.environ["TTS_HOME"] == str(tmp_path / "home")
    made = len(list((tmp_path / "out").rglob("*.flac")))
    assert f"{made} clips made, 0 were there already" in told and 0 < made < 12
    assert main([*argv, "--models", LJ, THORSTEN]) == 0
    assert f"0 clips made, {made} were there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--clips", "-1"], "--clips must not be negative"),
        (["--clips", "1", "--models", "vits"], "--models: unknown model 'vits'"),
        (["--clips", "1", "--text", "it=x"], "unknown language 'it'"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speak", "coqui", "--out", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_cuda_is_asked_for_only_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    argv = ["coqui", "--out", str(tmp_path / "out"), "--clips", "1", "--device", "cuda"]
    assert main(["speak", *argv]) == 2
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


def test_vits_real_weights_speak(tmp_path: Path) -> None:
    home = Path(os.environ.get("TTS_HOME") or cache_folder())
    if not (home / "tts" / LJ.replace("/", "--")).is_dir():
        pytest.skip(f"{LJ} is not in {home} (set TTS_HOME or SPEECH_WEIGHTS)")
    spec = voices(LJ, min_seconds=8.2)
    outcome = speak.speak(order(spec, tmp_path), 1, spec.models, coqui.load_coqui)
    assert outcome.made == 1, outcome
    wave, _ = soundfile.read(next(tmp_path.rglob("*.flac")))
    assert 8.2 <= len(wave) / 16_000 < 20
    loud = np.abs(wave).reshape(-1)[: len(wave) // 400 * 400].reshape(-1, 400).max(axis=1) > 0.02
    assert 0.3 < loud.mean() < 0.98  # syllables and pauses, neither silence nor hum
