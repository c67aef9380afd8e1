"""Synthetic speech as a corpus, by Coqui TTS models: resumable, with text and licence a clip.

A voice spec (``data_specs/voices``) says which models speak. Clip ``k`` is what it is whatever else
was made: its model, language, speaker, texts and the network's own noise are drawn from the spec's
seed and ``k`` alone. Clips are 16 kHz, mono, FLAC of 16 bits, as every corpus that this package
writes: the pipeline reads at 16 kHz whatever the model's own rate (22.05 to 48 kHz). The price: a
recipe's speed of 0.9 leaves such a clip empty above 7.2 kHz. Beside each lies its record, written
first, so that a clip that is there is whole; ``clips.jsonl`` holds all records. One process writes
a folder; to share the work, give each its ``--models`` and ``--out`` (a corpus takes several
folders).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_specs import voice
from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.hardware import require_device
from data_specs.io.progress import progress_bar
from data_specs.io.rng import Floats, stream
from data_specs.sample import SAMPLE_RATE
from data_specs.strict import SpecError, digest, unknown
from data_specs.voice import Sentences, VoiceModel, VoiceSpec, demo_sentences, load_voices
from pipeline.audio import resample
from pipeline.corpora.folder import (
    PEAK,
    Record,
    claimed,
    manifest_written,
    write_flac,
    write_record,
)
from pipeline.render.draw import pick
from train.models.weights import cache_folder

Wave = NDArray[np.float32]

MANIFEST = "clips.jsonl"
SINGLE = "single"
"""Folder of the speaker of a model that has but one."""

SILENT_PEAK = 1e-3
SHORTEST_SECONDS = 0.1
GIVE_UP = 3
"""After so many clips, and none of them good, a model is left alone."""


class NoSpeech(Exception):
    """A clip did not come out, for the reason it states."""


# --- texts ----------------------------------------------------------------------------------------

MARKUP = re.compile(r"[\[\]{}<>|\\/@=_*#~♪♫]")
"""Lines with these are songs, sound effects or leftovers of a subtitle's markup."""


class Texts(Protocol):
    """Sentences of one language; a list is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> str: ...


def sentence_of(line: str, rule: Sentences) -> str | None:
    """The sentence in a line of a text file, or None where it is not one to speak."""
    cells = line.rstrip("\r\n").split("\t")
    if len(cells) > 1 and len(cells) < rule.column:
        return None
    text = cells[rule.column - 1] if len(cells) > 1 else cells[0]
    text = " ".join(text.split()).lstrip("-–— ")  # subtitles mark a change of talker by a dash
    words = sum(any(map(str.isalpha, word)) for word in text.split())
    if MARKUP.search(text) or not rule.min_words <= words <= rule.max_words:
        return None
    return text


class TextFile:
    """The sentences of a UTF-8 text file that a rule keeps, read from the disk when asked for.

    Only their places are held in memory: MultiSubs has ten million English lines. Raises
    ``ValueError`` where none is kept or a line is not UTF-8, ``OSError`` for an unreadable file.
    """

    def __init__(self, path: Path, rule: Sentences) -> None:
        self.path, self.rule = path, rule
        self.places = array("q")
        hashed, place = hashlib.sha256(), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if sentence_of(self._decode(line, f"line {number}"), rule):
                    self.places.append(place)
                hashed.update(line)
                place += len(line)
        self.sha256 = hashed.hexdigest()
        if not self.places:
            raise UserError(
                f"{path}: no line is a sentence of {rule.min_words} to {rule.max_words} words; "
                f"write one a line, or in column {rule.column} between tabs"
            )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.places[index])
            return sentence_of(self._decode(file.readline(), "a line"), self.rule) or ""

    def _decode(self, line: bytes, where: str) -> str:
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {where}: not UTF-8: {error}") from error


def parse_texts(options: Sequence[str], spec: VoiceSpec) -> dict[str, Texts]:
    """Texts of every language of the spec, from ``LANG=FILE`` options, else the project's own few.

    Raises ``ValueError`` for a language that neither has, or that the spec does not speak.
    """
    files: dict[str, Path] = {}
    for option in options:
        language, equals, path = option.partition("=")
        if not equals or not path:
            raise UserError(f"--text {option}: write LANG=FILE")
        if language not in spec.languages:
            raise UserError(f"--text {option}: {unknown('language', language, spec.languages)}")
        files[language] = Path(path)
    texts: dict[str, Texts] = {}
    for language in spec.languages:
        if language in files:
            texts[language] = TextFile(files[language], spec.sentences)
        elif language in demo_sentences():
            texts[language] = demo_sentences()[language]
        else:
            raise UserError(f"no texts in language {language!r}: give --text {language}=FILE")
    return texts


def _texts_digest(texts: Mapping[str, Texts]) -> str:
    return digest({name: getattr(text, "sha256", text) for name, text in texts.items()})


# --- the library ----------------------------------------------------------------------------------


class Engine(Protocol):
    """A loaded model. ``speakers`` and ``languages`` are empty where it has but one."""

    @property
    def rate_hz(self) -> int: ...
    @property
    def speakers(self) -> Sequence[str]: ...
    @property
    def languages(self) -> Sequence[str]: ...
    @property
    def version(self) -> str: ...

    def say(self, text: str, speaker: str | None, language: str | None, seed: int) -> Wave:
        """Speech (T,) at ``rate_hz``; the same bits for the same arguments on one machine, device
        and number of threads."""


Loader = Callable[[str], Engine]


@cache
def listed() -> dict[str, Record]:
    """Every model and vocoder of the installed library's list, by full name.

    Raises ``UserError`` where the library is not installed.
    """
    found = importlib.util.find_spec("TTS")  # finds it without importing torch
    if found is None or found.origin is None:
        raise UserError("coqui-tts is not installed: run make setup")
    path = Path(found.origin).parent / ".models.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    return {
        f"{kind}/{language}/{dataset}/{model}": entry
        for kind, languages in tree.items()
        for language, datasets in languages.items()
        for dataset, models in datasets.items()
        for model, entry in models.items()
    }


def check_listed(spec: VoiceSpec, where: str) -> None:
    """Raise ``SpecError`` where a model is not the library's, or not with the licence it states."""
    for index, model in enumerate(spec.models):
        at = f"{where}: models[{index}]"
        _check_entry(f"{at}.name", f"{at}.licence", model.name, model.licence)
        vocoder = listed()[model.name].get("default_vocoder")
        if model.vocoder != vocoder:
            raise SpecError(f"{at}.vocoder: the library's default for {model.name} is {vocoder!r}")
        if model.vocoder and model.vocoder_licence:
            keys = (f"{at}.vocoder", f"{at}.vocoder_licence")
            _check_entry(*keys, model.vocoder, model.vocoder_licence)


def _check_entry(name_key: str, licence_key: str, name: str, licence: str) -> None:
    if name not in listed():
        kind = name.split("/")[0]
        names = [other for other in listed() if other.startswith(f"{kind}/")]
        raise SpecError(f"{name_key}: {unknown('model', name, names)}")
    stated = listed()[name].get("license") or voice.NOT_STATED
    if licence != stated:
        raise SpecError(f"{licence_key}: the library's list says {stated!r}, not {licence!r}")


@contextmanager
def _weights_home() -> Iterator[Path]:
    """Let the library keep its models in the project's cache where the user gave no ``TTS_HOME``.

    Models that the list takes from Hugging Face lie in that library's own cache (``HF_HOME``).
    """
    given = os.environ.get("TTS_HOME")
    home = Path(given).expanduser() if given else cache_folder()
    os.environ["TTS_HOME"] = str(home)
    try:
        yield home / "tts"
    finally:
        if given is None:
            del os.environ["TTS_HOME"]
        else:
            os.environ["TTS_HOME"] = given


def load_coqui(name: str, device: str = "cpu") -> Engine:
    """Load a listed model, downloaded by the library where it is not in its cache.

    A model in ``$TTS_HOME/tts/<name with -- for />`` (``config.json``, ``model_file.pth``) needs no
    network. Raises ``UserError`` where its terms were not agreed to, and whatever the library
    raises, with what to try.
    """
    from torch.random import fork_rng

    with _weights_home() as home:
        folder = home / name.replace("/", "--")
        _need_terms(name, folder)
        try:
            with fork_rng():  # building a network draws its first weights
                return _Coqui(name, device)
        except Exception as error:
            hint = f"; if its download was cut off, remove {folder}" if folder.is_dir() else ""
            raise UserError(f"{_words(error)}{hint}") from error


def _need_terms(name: str, folder: Path) -> None:
    """The library asks at the keyboard for agreement; here it must have been given before."""
    from TTS.utils.manage import ModelManager  # type: ignore[import-untyped]

    if not ModelManager.tos_agreed(listed()[name], folder):
        raise UserError(
            "its terms (https://tts-hub.github.io/cpml) need your agreement: read them, then set "
            "COQUI_TOS_AGREED=1"
        )


class _Coqui:
    """A model behind the library's own interface."""

    def __init__(self, name: str, device: str) -> None:
        from TTS.api import TTS  # type: ignore[import-untyped]

        self.tts = TTS(name, progress_bar=False).to(device)
        self.rate_hz = int(self.tts.synthesizer.output_sample_rate)
        self.speakers = list(self.tts.speakers or ())
        self.languages = list(self.tts.languages or ())
        self.version = f"coqui-tts {importlib.metadata.version('coqui-tts')}"

    def say(self, text: str, speaker: str | None, language: str | None, seed: int) -> Wave:
        import torch
        from torch.random import fork_rng

        with fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)  # VITS and the Tacotrons sample as they speak
            return np.asarray(self.tts.tts(text, speaker=speaker, language=language), np.float32)


def _words(error: Exception) -> str:
    """The first line of an error, or its type's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


# --- clips ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What is spoken, and where it goes."""

    spec: VoiceSpec
    out: Path
    texts: Mapping[str, Texts]


@dataclass
class Outcome:
    """What became of a run: clips made and kept, and what failed, with the reason."""

    made: int = 0
    kept: int = 0
    failed_models: dict[str, str] = field(default_factory=dict)
    failed_clips: dict[int, str] = field(default_factory=dict)


def models_of(spec: VoiceSpec, clips: int) -> NDArray[np.int64]:
    """Index of the model that speaks each of the first ``clips`` clips."""
    uniform = _as_uniform(stream(spec.seed, "speak/model", 0, clips)[:, 0])
    return pick(tuple(model.weight for model in spec.models), uniform)


def _as_uniform(words: NDArray[np.uint64]) -> Floats:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _index(seed: int, what: str, clip: int, size: int) -> int:
    """One of ``size``, drawn for decision ``what`` of a clip."""
    uniform = _as_uniform(stream(seed, f"speak/{what}", clip, 1)[0, :1])
    return int(uniform[0] * size)


def speaker_folder(speaker: str | None) -> str:
    """A speaker's name as a folder: some have blanks, slashes or a newline at the end."""
    return re.sub(r"[^\w.-]+", "_", (speaker or "").strip()).strip(".") or SINGLE


def speak(order: Order, clips: int, models: Sequence[VoiceModel], load: Loader) -> Outcome:
    """Make the missing of the first ``clips`` clips that are ``models``' to speak.

    A model that cannot be loaded, and a clip that cannot be spoken, are left out and told by name.
    Raises ``ValueError`` where the folder was made from another spec, seed or texts.
    """
    whole = f"spec {digest(order.spec.model_dump(mode='json', exclude={'about'}))[:16]}"
    made_of = f"speak: {order.spec.name}, {whole}, texts {_texts_digest(order.texts)[:16]}"
    outcome = Outcome()
    with (
        claimed(order.out, made_of, order.spec.seed),
        manifest_written(order.out / MANIFEST),
        progress_bar(desc="speak", unit="clip", total=clips) as bar,
    ):
        _speak_all(order, clips, models, load, outcome, bar)
    return outcome


def _speak_all(
    order: Order,
    clips: int,
    models: Sequence[VoiceModel],
    load: Loader,
    outcome: Outcome,
    bar: tqdm[Any],
) -> None:
    """Model by model, what is not there yet."""
    chosen = models_of(order.spec, clips)
    done = {int(path.stem) for path in order.out.rglob("*.flac") if path.stem.isdigit()}
    for index, model in enumerate(order.spec.models):
        mine = [int(clip) for clip in np.flatnonzero(chosen == index)]
        todo = [clip for clip in mine if clip not in done]
        outcome.kept += len(mine) - len(todo)
        bar.update(len(mine) - len(todo))
        if model in models and todo:
            _speak_model(order, model, todo, len(todo) < len(mine), load, outcome, bar)


def _speak_model(
    order: Order,
    model: VoiceModel,
    todo: Sequence[int],
    spoke: bool,
    load: Loader,
    outcome: Outcome,
    bar: tqdm[Any],
) -> None:
    """Make the clips ``todo`` of one model; ``spoke`` where the folder has some of it already."""
    try:
        engine = load(model.name)
    except Exception as error:  # whatever the library raises, the other models can speak
        outcome.failed_models[model.name] = _words(error)
        return
    failed = 0
    for clip in todo:
        try:
            wave, path, record = make_clip(order, model, engine, clip)
        except NoSpeech as reason:
            outcome.failed_clips[clip] = f"{model.name}: {reason}"
            failed += 1
            if failed >= GIVE_UP and not spoke:
                outcome.failed_models[model.name] = f"none of {failed} clips came out: {reason}"
                return
            continue
        write_record(order.out / path, record)
        write_flac(order.out / path, wave)
        spoke = True
        outcome.made += 1
        bar.update()


def make_clip(
    order: Order, model: VoiceModel, engine: Engine, clip: int
) -> tuple[NDArray[np.float64], str, Record]:
    """One clip (T,) at 16 kHz, its path below the folder, and its record.

    Raises ``NoSpeech`` where more sentences failed than the spec retries.
    """
    seed = order.spec.seed
    language = model.languages[_index(seed, "language", clip, len(model.languages))]
    speakers = sorted(engine.speakers)
    speaker = speakers[_index(seed, "speaker", clip, len(speakers))] if speakers else None
    say = partial(engine.say, speaker=speaker, language=_own_name(engine, model, language))
    native, text = _sentence_by_sentence(order, engine.rate_hz, language, clip, say)
    wave = resample(native[None], engine.rate_hz, SAMPLE_RATE)[0].astype(np.float64)
    wave *= PEAK / np.abs(wave).max()  # to full scale, but for some room, as the library saves
    folder = f"{language}/{model.name.replace('/', '--')}/{speaker_folder(speaker)}"
    record: Record = {
        "path": f"{folder}/{clip:06d}.flac",
        "text": text,
        "language": language,
        "speaker": speaker.strip() if speaker else SINGLE,
        "model": model.name,
        "licence": model.licence,
        "vocoder": model.vocoder,
        "vocoder_licence": model.vocoder_licence,
        "seconds": round(len(wave) / SAMPLE_RATE, 4),
        "made_by": engine.version,
    }
    return wave, record["path"], record


def _own_name(engine: Engine, model: VoiceModel, language: str) -> str | None:
    """What a multilingual model calls a language (fr-fr), None for a model with one."""
    if not engine.languages:
        return None
    for name in sorted(engine.languages):
        if name.strip().lower().split("-")[0] == language:
            return name
    known = ", ".join(sorted(engine.languages))
    raise NoSpeech(f"{model.name} does not speak {language!r}, but {known}")


def _sentence_by_sentence(
    order: Order, rate_hz: int, language: str, clip: int, say: Callable[..., Wave]
) -> tuple[Wave, str]:
    """Sentences, as drawn, until the clip is long enough: (T,) at ``rate_hz``, and the text."""
    spec, texts = order.spec, order.texts[language]
    waves: list[Wave] = []
    said: list[str] = []
    flaws: list[str] = []
    for turn in count():
        text = texts[_index(spec.seed, f"text/{turn}", clip, len(texts))]
        noise = int(stream(spec.seed, f"speak/noise/{turn}", clip, 1)[0, 0] >> np.uint64(1))
        wave, flaw = _try(partial(say, text, seed=noise), rate_hz)
        if flaw:
            flaws.append(flaw)
            if len(flaws) > spec.retries:
                raise NoSpeech(", ".join(f"{n} x {what}" for what, n in Counter(flaws).items()))
            continue
        waves.append(wave)
        said.append(text)
        if sum(map(len, waves)) >= spec.min_seconds * rate_hz:
            break
    return np.concatenate(waves), " ".join(said)


def _try(say: Callable[[], Wave], rate_hz: int) -> tuple[Wave, str]:
    """Speech and what is wrong with it, which is "" for good speech."""
    try:
        wave = say()
    except (RuntimeError, ValueError, LookupError) as error:
        if "out of memory" in str(error).lower():
            raise  # the machine's trouble, not the sentence's
        return np.zeros(0, np.float32), _words(error)
    if len(wave) < SHORTEST_SECONDS * rate_hz:
        return wave, "empty"
    if not np.isfinite(wave).all():
        return wave, "not finite"
    return wave, "silent" if np.abs(wave).max() < SILENT_PEAK else ""


# --- command line ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline speak", description=__doc__)
    parser.add_argument("spec", help="YAML file, or the name of one in data_specs/voices")
    parser.add_argument("--out", type=path_here, required=True, metavar="DIR")
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="of all models")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="LANG=FILE",
        help="one sentence a line, or id TAB sentence (MultiSubs); else a few of the project's",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="make only these models' clips"
    )
    parser.add_argument("--allow-noncommercial", action="store_true")
    return parser


def choose_models(spec: VoiceSpec, names: Sequence[str], noncommercial: bool) -> list[VoiceModel]:
    """The models to make clips of: those named, else all; each one left out is told in a line.

    Raises ``ValueError`` for a name that the spec does not have.
    """
    by_name = {model.name: model for model in spec.models}
    for name in names:
        if name not in by_name:
            raise UserError(f"--models: {unknown('model', name, by_name)}")
    chosen = []
    for model in (model for model in spec.models if not names or model.name in names):
        if model.noncommercial and not noncommercial:
            licence = " / ".join(filter(None, (model.licence, model.vocoder_licence)))
            print(f"left out: {model.name}: {licence}; --allow-noncommercial takes it in")
        else:
            chosen.append(model)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m pipeline speak SPEC --out DIR --clips N``: run it again to go on.

    Returns the exit status: 0 where all clips are there, 1 where a model or clip failed. Raises
    ``ValueError`` for wrong input.
    """
    args = _parser().parse_args(argv)
    if args.clips < 0:
        raise UserError(f"--clips must not be negative, is {args.clips}")
    require_device(args.device)
    spec = load_voices(args.spec)
    check_listed(spec, args.spec)
    models = choose_models(spec, args.models, args.allow_noncommercial)
    order = Order(spec, args.out, parse_texts(args.text, spec))
    outcome = speak(order, args.clips, models, partial(load_coqui, device=args.device))
    print(f"{args.out}: {outcome.made} clips made, {outcome.kept} were there already")
    for name, reason in outcome.failed_models.items():
        print(f"failed: {name}: {reason}")
    for clip, reason in sorted(outcome.failed_clips.items()):
        print(f"failed: clip {clip:06d}: {reason}")
    return 1 if outcome.failed_models or outcome.failed_clips else 0
