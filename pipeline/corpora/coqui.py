"""The models of Coqui TTS: the library's list, and a model of it loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from data_specs import voice
from data_specs.io.errors import UserError
from data_specs.strict import SpecError, unknown
from data_specs.voice import VoiceModel
from pipeline.corpora.folder import Record
from pipeline.corpora.voice_engine import Engine, Wave, first_line, require_package
from train.models.weights import cache_folder


@cache
def listed() -> dict[str, Record]:
    """Every model and vocoder of the installed library's list, by full name.

    Raises ``UserError`` where the library is not installed.
    """
    require_package("coqui-tts", "TTS", "pipeline")
    found = importlib.util.find_spec("TTS")
    path = Path(str(found and found.origin)).parent / ".models.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    return {
        f"{kind}/{language}/{dataset}/{model}": entry
        for kind, languages in tree.items()
        for language, datasets in languages.items()
        for dataset, models in datasets.items()
        for model, entry in models.items()
    }


def check_listed(model: VoiceModel, where: str) -> None:
    """Raise ``SpecError`` where a model is not the library's, or not with the licence it states."""
    _check_entry(f"{where}.name", f"{where}.licence", model.name, model.licence)
    vocoder = listed()[model.name].get("default_vocoder")
    if model.vocoder != vocoder:
        raise SpecError(f"{where}.vocoder: the library's default for {model.name} is {vocoder!r}")
    if model.vocoder and model.vocoder_licence:
        keys = (f"{where}.vocoder", f"{where}.vocoder_licence")
        _check_entry(*keys, model.vocoder, model.vocoder_licence)


def _check_entry(name_key: str, licence_key: str, name: str, licence: str) -> None:
    if name not in listed():
        kind = name.split("/")[0]
        names = [other for other in listed() if other.startswith(f"{kind}/")]
        raise SpecError(f"{name_key}: {unknown('model', name, names)}")
    stated = listed()[name].get("license") or voice.NOT_STATED
    if licence != stated:
        raise SpecError(f"{licence_key}: the library's list says {stated!r}, not {licence!r}")


def load_coqui(model: VoiceModel, device: str = "cpu") -> Engine:
    """Load a listed model, downloaded by the library where it is not in its cache.

    The cache is ``$TTS_HOME/tts``, else in the project's; a model in it (``config.json``,
    ``model_file.pth`` in ``<name with -- for />``) needs no network. Models that the list takes
    from Hugging Face lie in that library's own cache (``HF_HOME``). Raises ``UserError`` where its
    terms were not agreed to, which the library would ask for at the keyboard, and with the words of
    whatever the library raises.
    """
    from torch.random import fork_rng
    from TTS.utils.manage import ModelManager  # type: ignore[import-untyped]

    home = Path(os.environ.get("TTS_HOME") or cache_folder()).expanduser()
    os.environ["TTS_HOME"] = str(home)
    name = model.name
    folder = home / "tts" / name.replace("/", "--")
    if not ModelManager.tos_agreed(listed()[name], folder):
        raise UserError(
            "its terms (https://tts-hub.github.io/cpml) need your agreement: read them, then set "
            "COQUI_TOS_AGREED=1"
        )
    try:
        with fork_rng():  # building a network draws its first weights
            return _Coqui(name, device)
    except Exception as error:
        hint = f"; if its download was cut off, remove {folder}" if folder.is_dir() else ""
        raise UserError(f"{first_line(error)}{hint}") from error


class _Coqui:
    """A model behind the library's own interface."""

    def __init__(self, name: str, device: str) -> None:
        from TTS.api import TTS  # type: ignore[import-untyped]

        self.tts = TTS(name, progress_bar=False).to(device)
        self.rate_hz = int(self.tts.synthesizer.output_sample_rate)
        self.languages = list(self.tts.languages or ())
        self.version = f"coqui-tts {importlib.metadata.version('coqui-tts')}"

    def speakers(self, language: str) -> Sequence[str]:
        return list(self.tts.speakers or ())

    def say(self, text: str, speaker: str | None, language: str | None, seed: int) -> Wave:
        import torch
        from torch.random import fork_rng

        with fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)  # VITS and the Tacotrons sample as they speak
            return np.asarray(self.tts.tts(text, speaker=speaker, language=language), np.float32)
