"""Kokoro and Piper: small text-to-speech networks in ONNX, with espeak-ng's phonemes.

Both take phonemes of the espeak-ng that the ``piper-tts`` package brings, so that a text is the
same on every machine. They run on the CPU, with one thread: what they say follows from text,
speaker and seed. ``make voices`` brings the files into the cache of weights.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.io.errors import UserError
from data_specs.io.onnx_session import cpu_session
from data_specs.io.parse import json_object
from data_specs.io.rng import spelled_out
from data_specs.strict import SpecError
from data_specs.voice import VoiceModel
from data_specs.weight import all_weights
from pipeline.corpora.voice_engine import Wave, require_package
from train.models.weights import cached, find


def _phonemizer() -> str:
    """The package that both take phonemes of, and its version; ``UserError`` where it is not."""
    return f"piper-tts {require_package('piper-tts', 'piper', 'voices')}"


# --- Kokoro ---------------------------------------------------------------------------------------

KOKORO = "kokoro"
ESPEAK_VOICES = {
    **{"a": "en-us", "b": "en-gb-x-rp", "e": "es", "f": "fr", "h": "hi", "i": "it", "p": "pt-br"}
}
"""By the first letter of a Kokoro voice's name, what espeak-ng calls its language. Japanese (j) and
Chinese (z) want phonemes of other packages."""

SLOWEST, FASTEST = 0.88, 1.12
"""The network draws nothing, so the seed draws the pace: no clip is another's copy."""


def check_kokoro(model: VoiceModel, where: str) -> None:
    """``UserError`` where package or weights are missing, or the entry is not what they are."""
    known = {voice[:2] for voice in ESPEAK_VOICES.values()}
    if unknown := sorted({*model.languages} - known):
        raise SpecError(
            f"{where}.languages: Kokoro here speaks {', '.join(sorted(known))}, not {unknown[0]}"
        )
    if model.licence != (stated := all_weights()[KOKORO].licence):
        raise SpecError(f"{where}.licence: weights.yaml says {stated!r}, not {model.licence!r}")
    _phonemizer()
    _weights_found()


def _weights_found() -> Path:
    try:
        return find(KOKORO)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


class Kokoro:
    """Kokoro-82M (Apache-2.0): int8 ONNX, 24 kHz, 41 voices of six languages.

    A voice has a style (256,) for every number of phonemes to 510 (kokoro-onnx 0.6.1,
    ``_style_for``); tokens stand between two zeros.
    """

    rate_hz = 24_000
    languages: Sequence[str] = ()

    def __init__(self, model: VoiceModel, device: str = "cpu") -> None:
        folder = _weights_found()
        self.session = cpu_session(folder / "kokoro-v1.0.int8.onnx", threads=1)
        self.styles: Mapping[str, NDArray[np.float32]] = np.load(folder / "voices-v1.0.npz")
        self.tokens: dict[str, int] = json.loads((folder / "config.json").read_bytes())["vocab"]
        self.version = f"Kokoro-82M v1.0 int8, {_phonemizer()}"

    def speakers(self, language: str) -> Sequence[str]:
        return [v for v in self.styles if ESPEAK_VOICES.get(v[0], "").startswith(language)]

    def say(self, text: str, speaker: str | None, language: str | None, seed: int) -> Wave:
        style = self.styles[str(speaker)]
        phonemes = " ".join(_phonemes(ESPEAK_VOICES[str(speaker)[0]], text))
        tokens = [self.tokens[one] for one in phonemes if one in self.tokens]
        if not 0 < len(tokens) <= len(style):
            raise ValueError(f"{len(tokens)} phonemes, of at most {len(style)}")
        pace = spelled_out(seed).uniform(SLOWEST, FASTEST)
        fed = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": style[len(tokens) - 1],
            "speed": np.array([pace], np.float32),
        }
        return _trimmed(np.asarray(self.session.run(None, fed)[0], np.float32).ravel())


def _trimmed(wave: Wave) -> Wave:
    """Speech (T,) with a tenth of a second around it: Kokoro leaves half a second at both ends."""
    margin, size = Kokoro.rate_hz // 10, np.abs(wave)
    loud = np.flatnonzero(size > size.max(initial=0) / 100)
    return wave[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else wave


@cache
def _espeak() -> Any:
    from piper.phonemize_espeak import EspeakPhonemizer

    return EspeakPhonemizer()


def _phonemes(voice: str, text: str) -> list[str]:
    """Phonemes of each sentence, decomposed but for the one that Kokoro's vocabulary composes."""
    sentences = ("".join(one) for one in _espeak().phonemize(voice, text))
    return [one.replace(unicodedata.normalize("NFD", "ç"), "ç") for one in sentences]


# --- Piper ----------------------------------------------------------------------------------------

PIPER = "piper"
MOST_NOISE = 1 << 20
"""Random numbers that a sentence may take: 192 a frame of 256 samples, 63 s at 22.05 kHz."""


def check_piper(model: VoiceModel, where: str) -> None:
    """``UserError`` where package or voice is missing."""
    _phonemizer()
    require_package("onnx", "onnx", "voices")
    voice_files(model.name)


def voice_files(name: str) -> tuple[Path, Path]:
    """Network and configuration of a Piper voice. ``UserError`` with what brings them."""
    folder = cached(PIPER)
    paths = folder / f"{name}.onnx", folder / f"{name}.onnx.json"
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"no {path.name} in {folder}: run make voices, or put the voice's two files there"
            )
    return paths


class Piper:
    """A Piper voice, a VITS in ONNX; the noise that it samples from is drawn by the seed."""

    languages: Sequence[str] = ()

    def __init__(self, model: VoiceModel, device: str = "cpu") -> None:
        from piper import PiperVoice
        from piper.config import PhonemeType, PiperConfig

        network, path = voice_files(model.name)
        config = PiperConfig.from_dict(
            json_object(path.read_bytes(), path, "bring the voice again")
        )
        if config.phoneme_type != PhonemeType.ESPEAK:
            raise UserError(f"{path}: only voices with espeak-ng's phonemes are spoken here")
        noisy, self.noises = with_noise_inputs(network)
        self.session = cpu_session(noisy, threads=1)
        self.voice = PiperVoice(self.session, config)
        self.rate_hz = config.sample_rate
        self.version = _phonemizer()

    def speakers(self, language: str) -> Sequence[str]:
        return list(self.voice.config.speaker_id_map)

    def say(self, text: str, speaker: str | None, language: str | None, seed: int) -> Wave:
        rng, config = spelled_out(seed), self.voice.config
        waves = []
        for phonemes in self.voice.phonemize(text):
            ids = self.voice.phonemes_to_ids(phonemes)
            scales = config.noise_scale, config.length_scale, config.noise_w_scale
            fed: dict[str, Any] = {
                "input": np.array([ids], np.int64),
                "input_lengths": np.array([len(ids)], np.int64),
                "scales": np.array(scales, np.float32),
            }
            if speaker is not None:
                fed["sid"] = np.array([config.speaker_id_map[speaker]], np.int64)
            fed |= {name: rng.standard_normal(MOST_NOISE, np.float32) for name in self.noises}
            waves.append(np.asarray(self.session.run(None, fed)[0], np.float32).ravel())
        return np.concatenate(waves) if waves else np.zeros(0, np.float32)


def with_noise_inputs(path: Path) -> tuple[bytes, list[str]]:
    """A network whose random numbers come from inputs (``MOST_NOISE``,), and the inputs' names.

    onnxruntime seeds ``RandomNormalLike`` once a session, so that a clip would depend on those
    made before it.
    """
    import onnx
    from onnx.helper import make_node, make_tensor_value_info

    network = onnx.load(path)
    graph, nodes = network.graph, []
    names: list[str] = []
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), "noise_start"))
    for node in graph.node:
        if node.op_type != "RandomNormalLike":
            nodes.append(node)
            continue
        name = f"noise_{len(names)}"
        names.append(name)
        graph.input.append(make_tensor_value_info(name, onnx.TensorProto.FLOAT, [MOST_NOISE]))
        nodes += [
            make_node("Shape", node.input, [f"{name}_shape"]),
            make_node("ReduceProd", [f"{name}_shape"], [f"{name}_end"], keepdims=1),
            make_node("Slice", [name, "noise_start", f"{name}_end"], [f"{name}_part"]),
            make_node("Reshape", [f"{name}_part", f"{name}_shape"], node.output),
        ]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return network.SerializeToString(), names
