"""External scorers by name: ``distillmos``, ``dnsmos``, ``nisqa``, ``squim``, ``utmos``.

Each runs as its own package runs it, on whole clips and with its own handling of short and long
ones. Packages are imported when a scorer is asked for by name, and those that bring no weights
fetch them then, into their own caches. What cannot be had is ``Unavailable``, which says why and
what would get it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.onnx_session import cpu_session
from data_specs.sample import SAMPLE_RATE
from data_specs.strict import digest
from train.audio import Wave, read_mono, to_16k
from train.evaluation.records import Output, Scored, Unavailable
from train.models.tensors import state_sha256
from train.scoring.code import made_with
from train.scoring.scorer import torch_on

Loaded = Callable[[Wave, int], Mapping[str, float]]
"""What scores a clip (T,) at a rate in Hz: values by the name of an output."""


@dataclass(frozen=True)
class Options:
    """What a scorer may need: the device, and clean speech (any) for SQUIM's subjective model."""

    device: str = "cpu"
    clean_speech: Path | None = None


Made = tuple[Loaded, str, int | None]
"""What scores, SHA-256 of its weights, its number of parameters (None: not known)."""


@dataclass(frozen=True)
class Known:
    """A scorer that can be asked for: ``rate`` is what it takes (None: the file's own, Hz)."""

    about: str
    package: str
    rate: int | None
    clips: str
    get: str
    outputs: tuple[Output, ...]
    load: Callable[[Options], Made]


@dataclass(frozen=True)
class ExternalScorer:
    """A loaded external scorer, with those of its outputs that were asked for."""

    name: str
    known: Known
    outputs: tuple[Output, ...]
    weights_sha256: str
    parameters: int | None
    version: str
    call: Loaded

    def score_files(self, paths: Sequence[Path], padding: str) -> Iterator[Scored]:
        """Score files, in order."""
        for path in paths:
            try:
                wave_T, rate = read_mono(path)
            except UserError as error:
                yield str(error)
                continue
            yield self._scored(wave_T, rate, str(path))

    def score_windows(self, waves: Sequence[Wave]) -> list[Scored]:
        """Score windows of 7.68 s at 16 kHz."""
        return [self._scored(wave_T, SAMPLE_RATE, "a sample of the shards") for wave_T in waves]

    def _scored(self, wave_T: Wave, rate: int, where: str) -> Scored:
        try:
            return self.score(wave_T, rate)
        except UserError as error:
            return f"{where}: {error}"

    def score(self, wave_T: Wave, rate: int) -> dict[str, float]:
        """All outputs of a clip (T,), by output name. ``UserError`` where the scorer gives none.

        What a foreign scorer raises becomes a ``UserError``: the clip counts as not scored.
        """
        if self.known.rate == SAMPLE_RATE:
            wave_T, rate = to_16k(wave_T, rate), SAMPLE_RATE
        try:
            found = self.call(wave_T, rate)
        except Exception as error:  # anything may come out of foreign code
            raise UserError(f"{self.name}: {_first_line(error)}") from error
        values = {output.name: float(found[output.key]) for output in self.known.outputs}
        wrong = [name for name, value in values.items() if not np.isfinite(value)]
        if wrong:
            raise UserError(f"{self.name}: {wrong[0]} of the clip is not finite")
        return values


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = textwrap.shorten(text.splitlines()[0], 160, placeholder=" ...") if text else ""
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _made_of(
    network: nn.Module, options: Options, *names: str, call: Callable[..., Any] | None = None
) -> Made:
    """A network that takes a batch of clips and gives an output a name, or one alone.

    ``call`` is what runs it, if not the network itself.
    """

    @torch.inference_mode()
    def scores(wave_T: Wave, rate: int) -> Mapping[str, float]:
        found = (call or network)(torch.from_numpy(wave_T)[None].to(options.device))
        return dict(zip(names, map(float, found if len(names) > 1 else (found,)), strict=True))

    return scores, state_sha256(network), _size(network)


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- the scorers ----------------------------------------------------------------------------------


def _load_distillmos(options: Options) -> Made:
    sqa = importlib.import_module("distillmos.sqa")
    with contextlib.redirect_stdout(io.StringIO()):  # it says where its weights are
        network = sqa.ConvTransformerSQAModel().to(options.device).eval()
    scores, _, parameters = _made_of(network, options, "mos")
    return scores, sha256_of(Path(sqa.DEFAULT_WEIGHTS_CHKPT)), parameters


def _load_dnsmos(options: Options) -> Made:
    dnsmos = importlib.import_module("speechmos.dnsmos")
    importlib.import_module("onnxruntime")  # where it is missing it is named
    folder = Path(str(dnsmos.__file__)).parent / "dnsmos_models"
    paths = [folder / "sig_bak_ovr.onnx", folder / "model_v8.onnx"]
    model = dnsmos.DNSMOS(*(str(path) for path in paths))
    # The package's sessions take every core, whatever PyTorch was told.
    model.onnx_sess, model.p808_onnx_sess = (
        cpu_session(path, torch.get_num_threads()) for path in paths
    )

    def scores(wave_T: Wave, rate: int) -> Mapping[str, float]:
        # Resampling may overshoot full scale by a little, and the package refuses that.
        found: Mapping[str, float] = model(np.clip(wave_T, -1, 1), rate, False)
        return found

    return scores, digest([sha256_of(path) for path in paths]), None


def _load_nisqa(options: Options) -> Made:
    nisqa = importlib.import_module("torchmetrics.functional.audio.nisqa")
    for package in ("librosa", "requests"):  # without them torchmetrics fails at the first clip
        importlib.import_module(package)
    network, _ = nisqa._load_nisqa_model()

    def scores(wave_T: Wave, rate: int) -> Mapping[str, float]:
        found_5 = nisqa.non_intrusive_speech_quality_assessment(torch.from_numpy(wave_T), rate)
        return dict(zip(("mos", "noi", "dis", "col", "loud"), found_5.tolist(), strict=True))

    return scores, state_sha256(network), _size(network)


def _load_squim_objective(options: Options) -> Made:
    pipelines = importlib.import_module("torchaudio.pipelines")
    network = pipelines.SQUIM_OBJECTIVE.get_model().to(options.device).eval()
    return _made_of(network, options, "stoi", "pesq", "si_sdr")


def _load_squim_subjective(options: Options) -> Made:
    if options.clean_speech is None:
        raise UserError("it compares with a recording of clean speech, any: give --clean-speech")
    clean_T = torch.from_numpy(to_16k(*read_mono(options.clean_speech)))
    pipelines = importlib.import_module("torchaudio.pipelines")
    network = pipelines.SQUIM_SUBJECTIVE.get_model().to(options.device).eval()
    clean_1T = clean_T[None].to(options.device)
    scores, sha256, parameters = _made_of(
        network, options, "mos", call=lambda waves_1T: network(waves_1T, clean_1T)
    )
    clean = hashlib.sha256(clean_T.numpy().tobytes()).hexdigest()
    return scores, digest([sha256, clean]), parameters


def _load_utmos(options: Options) -> Made:
    utmos = importlib.import_module("utmos_pytorch")
    network = utmos.UTMOSScoreTorch(device=options.device)
    return _made_of(network, options, "mos", call=network.score)


_ASKS = "python -c 'import torchaudio; torchaudio.pipelines.{}.get_model()'"

EXTERNAL: dict[str, Known] = {
    "distillmos": Known(
        "Distill-MOS v7 as its package runs it (the authors' own code)",
        "distillmos",
        SAMPLE_RATE,
        "zeros behind short clips; windows of 7.68 s at most 1 s apart, their mean",
        "pip install distillmos",
        (Output("distillmos", "mos", "overall quality"),),
        _load_distillmos,
    ),
    "dnsmos": Known(
        "DNSMOS P.808 and P.835 (Microsoft, in the package speechmos)",
        "speechmos",
        SAMPLE_RATE,
        "repeats short clips; windows of 9.01 s, 1 s apart, their mean",
        "pip install speechmos onnxruntime librosa",
        (
            Output("dnsmos-p808", "p808_mos", "overall quality (ITU-T P.808)", True, 50_000),
            Output("dnsmos-p835", "ovrl_mos", "overall quality (ITU-T P.835)", True, 170_000),
            Output("dnsmos-p835-sig", "sig_mos", "P.835: the speech alone", True, 170_000),
            Output("dnsmos-p835-bak", "bak_mos", "P.835: the background alone", True, 170_000),
        ),
        _load_dnsmos,
    ),
    "nisqa": Known(
        "NISQA v2.0 as torchmetrics runs it (weights CC BY-NC-SA 4.0, fetched from GitHub)",
        "torchmetrics",
        None,
        "hears the file's own rate; the whole clip at once, at most about 52 s",
        "pip install torchmetrics librosa requests, then once with a network: python -c 'from "
        "torchmetrics.functional.audio.nisqa import _load_nisqa_model as load; load()' (or put "
        "NISQA's nisqa.tar into ~/.torchmetrics/NISQA)",
        (Output("nisqa", "mos", "overall quality"),),
        _load_nisqa,
    ),
    "squim-objective": Known(
        "SQUIM's objective model (torchaudio's pipelines; weights CC BY 4.0, 28 MB, fetched)",
        "torchaudio",
        SAMPLE_RATE,
        "the whole clip at once",
        "once with a network: " + _ASKS.format("SQUIM_OBJECTIVE"),
        (
            Output("squim-pesq", "pesq", "PESQ as SQUIM guesses it without a reference", False),
            Output("squim-stoi", "stoi", "STOI, likewise", False),
            Output("squim-si-sdr", "si_sdr", "SI-SDR in dB, likewise", False),
        ),
        _load_squim_objective,
    ),
    "squim-subjective": Known(
        "SQUIM's subjective model (torchaudio's pipelines; weights CC BY-NC 4.0, 360 MB, fetched)",
        "torchaudio",
        SAMPLE_RATE,
        "the whole clip at once, beside one recording of clean speech (--clean-speech)",
        "once with a network: " + _ASKS.format("SQUIM_SUBJECTIVE") + ", and --clean-speech FILE",
        (Output("squim-mos", "mos", "overall quality"),),
        _load_squim_subjective,
    ),
    "utmos": Known(
        "UTMOS strong learner (package utmos-pytorch, MIT; weights fetched from its hub)",
        "utmos-pytorch",
        SAMPLE_RATE,
        "the whole clip at once",
        "pip install utmos-pytorch, then once with a network: python -c 'import utmos_pytorch; "
        "utmos_pytorch.UTMOSScoreTorch()'",
        (Output("utmos", "mos", "naturalness"),),
        _load_utmos,
    ),
}

GROUPS = {"squim": ("squim-objective", "squim-subjective")}
"""Names for several scorers."""


def outputs_named(name: str) -> list[tuple[str, tuple[Output, ...]]]:
    """The external scorers that a name asks for, with the outputs it asks for; none if unknown.

    A scorer's name asks for all of its outputs, an output's name (``dnsmos-p808``) for that one.
    """
    if name in GROUPS or name in EXTERNAL:
        return [(one, EXTERNAL[one].outputs) for one in GROUPS.get(name, (name,))]
    return [
        (family, (output,))
        for family, known in EXTERNAL.items()
        for output in known.outputs
        if output.name == name
    ]


def load_external(
    name: str, outputs: tuple[Output, ...], options: Options
) -> ExternalScorer | Unavailable:
    """Load a scorer of ``EXTERNAL``, or say what hinders it."""
    known = EXTERNAL[name]
    try:
        scores, sha256, parameters = known.load(options)
        version = importlib.metadata.version(known.package)
    except Exception as error:  # whatever a foreign loader raises, the scorer is not there
        return Unavailable(name, _reason(error), known.get)
    version = f"{known.package} {version}, {made_with(torch_on(torch.device(options.device)))}"
    return ExternalScorer(name, known, outputs, sha256, parameters, version, scores)


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed"
    if isinstance(error, UserError):
        return str(error)
    return f"it cannot be loaded or fetched ({_first_line(error)})"
