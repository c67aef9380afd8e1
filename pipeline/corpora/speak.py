"""Synthetic speech as a corpus, by any engine: resumable, with text and licence a clip.

A voice spec (``data_specs/voices``) says which models speak. Model, language, speaker, texts and
the network's own noise, or the pace where it has none, of clip ``k`` are drawn from the spec's seed
and ``k`` alone. Clips are 16 kHz, mono, FLAC of 16 bits, whatever the model's own rate (22.05 to 48
kHz), so that a recipe's speed of 0.9 leaves them empty above 7.2 kHz. Beside each lies its record,
written first: a clip that is there is whole. ``clips.jsonl`` holds all records. To share the work,
give each process its ``--models`` and ``--out`` (a corpus takes several folders).
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.hardware import require_device
from data_specs.io.progress import progress_bar
from data_specs.io.rng import stream, unit
from data_specs.sample import SAMPLE_RATE
from data_specs.strict import digest, unknown
from data_specs.voice import VoiceModel, VoiceSpec, load_voices
from pipeline.audio import resample
from pipeline.corpora.coqui import check_listed, load_coqui
from pipeline.corpora.folder import (
    PEAK,
    Record,
    claimed,
    manifest_written,
    write_flac,
    write_record,
)
from pipeline.corpora.onnx_voices import Kokoro, Piper, check_kokoro, check_piper
from pipeline.corpora.texts import Texts, parse_texts, texts_digest
from pipeline.corpora.voice_engine import Engine, Wave, first_line
from pipeline.draw import index as drawn
from pipeline.draw import pick

MANIFEST = "clips.jsonl"
SINGLE = "single"
"""Folder of the speaker of a model that has but one."""

SILENT_PEAK = 1e-3
SHORTEST_SECONDS = 0.1
GIVE_UP = 3
"""After so many clips, and none of them good, a model is left alone."""


Loader = Callable[[VoiceModel], Engine]

CHECKS: dict[str, Callable[[VoiceModel, str], None]] = {
    "coqui": check_listed,
    "kokoro": check_kokoro,
    "piper": check_piper,
}
"""By engine: raises ``UserError`` for what a model lacks here, before anything is said."""

ENGINES: dict[str, Callable[[VoiceModel, str], Engine]] = {
    "coqui": load_coqui,
    "kokoro": Kokoro,
    "piper": Piper,
}
"""By engine: loads a model. The device is for those that can use another than the CPU."""


class NoSpeech(Exception):
    """A clip did not come out, for the reason it states."""


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
    uniform = unit(stream(spec.seed, "speak/model", 0, clips)[:, 0])
    return pick(tuple(model.weight for model in spec.models), uniform)


def speaker_folder(speaker: str | None) -> str:
    """A speaker's name as a folder: some have blanks, slashes or a newline at the end."""
    return re.sub(r"[^\w.-]+", "_", (speaker or "").strip()).strip(".") or SINGLE


def speak(order: Order, clips: int, models: Sequence[VoiceModel], load: Loader) -> Outcome:
    """Make the missing of the first ``clips`` clips that are ``models``' to speak.

    A model that cannot be loaded and a clip that cannot be spoken are left out, and named.
    Raises ``UserError`` where the folder was made from another spec, seed or texts.
    """
    values = order.spec.model_dump(mode="json", exclude={"about"})
    name = f"speak: {order.spec.name}, spec {digest(values)[:16]}"
    chosen, outcome = models_of(order.spec, clips), Outcome()
    with (
        claimed(order.out, f"{name}, texts {texts_digest(order.texts)[:16]}", order.spec.seed),
        manifest_written(order.out / MANIFEST),
        progress_bar(desc="speak", unit="clip", total=clips) as bar,
    ):
        done = {int(path.stem) for path in order.out.rglob("*.flac") if path.stem.isdigit()}
        for index, model in enumerate(order.spec.models):
            mine = [int(clip) for clip in np.flatnonzero(chosen == index)]
            todo = [clip for clip in mine if clip not in done]
            outcome.kept += len(mine) - len(todo)
            bar.update(len(mine) - len(todo))
            if model in models and todo:
                spoke = len(todo) < len(mine)
                for _ in _speak_model(order, model, todo, spoke, load, outcome):
                    bar.update()
    return outcome


def _speak_model(
    order: Order,
    model: VoiceModel,
    todo: Sequence[int],
    spoke: bool,
    load: Loader,
    outcome: Outcome,
) -> Iterator[int]:
    """Make the clips ``todo`` of one model; ``spoke`` where the folder has some of it already."""
    try:
        engine = load(model)
    except Exception as error:  # whatever the library raises, the other models can speak
        outcome.failed_models[model.name] = first_line(error)
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
        yield clip


def make_clip(
    order: Order, model: VoiceModel, engine: Engine, clip: int
) -> tuple[NDArray[np.float64], str, Record]:
    """One clip (T,) at 16 kHz, its path below the folder, and its record.

    Raises ``NoSpeech`` where more sentences failed than the spec retries.
    """
    seed = order.spec.seed
    language = model.languages[drawn(seed, "speak/language", clip, len(model.languages))]
    speakers = sorted(engine.speakers(language))
    speaker = speakers[drawn(seed, "speak/speaker", clip, len(speakers))] if speakers else None
    say = partial(engine.say, speaker=speaker, language=_own_name(engine, model, language))
    native, text = _sentence_by_sentence(order, engine.rate_hz, language, clip, say)
    wave = resample(native[None], engine.rate_hz, SAMPLE_RATE)[0].astype(np.float64)
    wave *= PEAK / np.abs(wave).max()  # nearly full scale, as the library saves
    folder = f"{language}/{model.name.replace('/', '--')}/{speaker_folder(speaker)}"
    record: Record = {
        "path": f"{folder}/{clip:06d}.flac",
        "text": text,
        "language": language,
        "speaker": speaker.strip() if speaker else SINGLE,
        "model": model.name,
        "engine": model.engine,
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
        text = texts[drawn(spec.seed, f"speak/text/{turn}", clip, len(texts))]
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
            raise  # a fault of the machine, not of the sentence
        return np.zeros(0, np.float32), first_line(error)
    if len(wave) < SHORTEST_SECONDS * rate_hz:
        return wave, "empty"
    if not np.isfinite(wave).all():
        return wave, "not finite"
    return wave, "silent" if np.abs(wave).max() < SILENT_PEAK else ""


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
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
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of Coqui's; others use the CPU"
    )
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="make only these models' clips"
    )
    parser.add_argument("--allow-noncommercial", action="store_true")


def choose_models(spec: VoiceSpec, names: Sequence[str], noncommercial: bool) -> list[VoiceModel]:
    """The models to make clips of: those named, else all; each one left out is printed.

    Raises ``UserError`` for a name that the spec does not have.
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


def run(args: argparse.Namespace) -> int:
    """Speak, or go on with it; exit status 1 where a model or a clip failed."""
    if args.clips < 0:
        raise UserError(f"--clips must not be negative, is {args.clips}")
    require_device(args.device)
    spec = load_voices(args.spec)
    models = choose_models(spec, args.models, args.allow_noncommercial)
    for index, model in enumerate(spec.models):
        if model in models:
            CHECKS[model.engine](model, f"{args.spec}: models[{index}]")
    order = Order(spec, args.out, parse_texts(args.text, spec))
    outcome = speak(order, args.clips, models, lambda m: ENGINES[m.engine](m, args.device))
    print(f"{args.out}: {outcome.made} clips made, {outcome.kept} were there already")
    for name, reason in outcome.failed_models.items():
        print(f"failed: {name}: {reason}")
    for clip, reason in sorted(outcome.failed_clips.items()):
        print(f"failed: clip {clip:06d}: {reason}")
    return 1 if outcome.failed_models or outcome.failed_clips else 0
