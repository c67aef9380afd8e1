"""The processors: one file each, one table that names them, and how a group runs through them."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_specs.io.errors import UserError
from data_specs.io.waves import audible_samples
from data_specs.recipe import Option, Recipe
from data_specs.sample import SAMPLE_RATE
from data_specs.teacher import packages_of
from pipeline.audio import DropSample
from pipeline.render.processors import (
    band_limit,
    clip,
    codec,
    deepfilternet3,
    deepfilternet3_onnx,
    demucs,
    dropout,
    encodec,
    equalise,
    fargan,
    hifigan,
    late_reverb,
    level,
    lpcnet,
    mnru,
    nsnet2,
    opus,
    spectral_gating,
)
from pipeline.render.processors.interface import Params, Processor, Run, Waves, noncommercial
from pipeline.render.processors.networks import groups

PROCESSORS: dict[str, Processor] = {
    "none": Processor(lambda waves_BT, params: waves_BT),
    "spectral_gating": spectral_gating.PROCESSOR,
    "deepfilternet3": deepfilternet3.PROCESSOR,
    "deepfilternet3_onnx": deepfilternet3_onnx.PROCESSOR,
    "nsnet2": nsnet2.PROCESSOR,
    "demucs": demucs.PROCESSOR,
    "hifigan": hifigan.PROCESSOR,
    "lpcnet": lpcnet.PROCESSOR,
    "fargan": fargan.PROCESSOR,
    "opus": opus.PROCESSOR,
    **codec.PROCESSORS,
    "encodec": encodec.PROCESSOR,
    "band_limit": band_limit.PROCESSOR,
    "equalise": equalise.PROCESSOR,
    "clip": clip.PROCESSOR,
    "dropout": dropout.PROCESSOR,
    "level": level.PROCESSOR,
    "late_reverb": late_reverb.PROCESSOR,
    "mnru": mnru.PROCESSOR,
}


class ContractError(RuntimeError):
    """A processor returned what none may return: a mistake in the code, not in the sample."""


class SelfCheckError(UserError):
    """A recipe asks for processors that this machine cannot run; the message names each."""


def self_check(recipe: Recipe, using: Run | None = None) -> None:
    """Run every processor of the recipe once, on a second of sound.

    ``using`` is ``run``, which is the default, or the same behind a ``guard.Guard``: a job's check
    must outlive what native code does. Raises ``SelfCheckError`` naming all that fail and why, so
    that a missing library or weight stops a job within seconds instead of in the night.
    """
    problems = [
        f"  {option.use.kind} (stage {stage.stage!r}): {problem}"
        for stage in recipe.all_stages()
        for option in stage.choices
        if (problem := _not_allowed(recipe, option.use.kind) or _problem(option, using))
    ]
    if problems:
        built = ", ".join(sorted(PROCESSORS))
        raise SelfCheckError(
            f"recipe {recipe.name!r} needs processors that cannot run here:\n"
            + "\n".join(problems)
            + f"\nprocessors that are built: {built}"
        )


def _not_allowed(recipe: Recipe, kind: str) -> str | None:
    licence = PROCESSORS[kind].licence
    if recipe.allow_noncommercial or not noncommercial(licence):
        return None
    return f"is {licence}: say allow_noncommercial: true in the recipe, or leave it out"


def licences(kinds: Iterable[str]) -> tuple[str, ...]:
    """Licences of the processors that a sample went through, sorted."""
    return tuple(sorted({PROCESSORS[kind].licence for kind in kinds} - {""}))


def _problem(option: Option, using: Run | None) -> str | None:
    kind = option.use.kind
    columns = PROCESSORS[kind].draw(option.use, lambda name: np.full(1, 0.5), "self_check")
    params = {name: float(values[0]) for name, values in columns.items()}
    tone = np.sin(np.arange(SAMPLE_RATE, dtype=np.float32) * 0.3) * 0.1
    try:
        PROCESSORS[kind].require(option.use)
        PROCESSORS[kind].weights(option.use)  # of all it may draw, not of the one run here alone
        (using or run)(kind, tone[None].astype(np.float32), [params])
    except (UserError, ImportError, OSError, DropSample) as error:
        return str(error).removeprefix(f"{kind}: ")
    except Exception as error:  # a guard's says of which type it was
        return f"{type(error).__name__}: {error}" if using is None else str(error)
    return None


CORE_PACKAGES = ("numpy", "scipy", "soundfile", "soxr", "torch")


def audio_packages(recipe: Recipe) -> set[str]:
    """Packages that the recipe's audio depends on."""
    return {*CORE_PACKAGES, *(p for k in recipe.kinds() for p in PROCESSORS[k].packages)}


def versions(recipe: Recipe) -> dict[str, str]:
    """Versions of the packages that the recipe's audio and labels depend on: part of the data.

    Of those that are installed: one of two vocoders may run without what the other needs.
    """
    found = {}
    for name in sorted(audio_packages(recipe) | packages_of(recipe.teacher.name)):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    for kind in recipe.kinds():
        found |= PROCESSORS[kind].libraries()
    return found


def weights_sha256(recipe: Recipe) -> dict[str, str]:
    """Hash of the weights of each processor of the recipe that has any: part of the data."""
    paths: dict[str, dict[Path, None]] = {}
    for stage in recipe.all_stages():
        for use in (option.use for option in stage.choices):
            paths.setdefault(use.kind, {}).update(dict.fromkeys(PROCESSORS[use.kind].weights(use)))
    return {kind: _sha256(found) for kind, found in sorted(paths.items()) if found}


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Run one processor over a group and hold it to its contract.

    A processor gets a wave up to the digital silence behind it, which stays as it is: the loudest
    tenth of a short clip is a tenth of what is audible, whatever it is padded to. Raises
    ``DropSample`` where the processor raises or its output is not finite, ``ContractError`` for a
    wrong shape. A missing file or library and memory that is short are no sample's own fault:
    ``OSError``, ``UserError`` and such pass through.
    """
    out_BT = np.zeros_like(waves_BT)
    for length, rows in groups([audible_samples(wave_T) for wave_T in waves_BT]):
        out_BT[rows, :length] = _run(
            kind, waves_BT[rows, :length], [params[i] for i in rows.tolist()]
        )
    return out_BT


def _run(kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
    out = _process(kind, waves_BT, params)
    if out.shape != waves_BT.shape or out.dtype != np.float32:
        raise ContractError(f"{kind} returned {out.dtype} {out.shape} for {waves_BT.shape}")
    if not np.isfinite(out).all():
        raise DropSample("non_finite", f"{kind} returned NaN or infinity")
    return out


def _process(kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
    try:
        return PROCESSORS[kind].process(waves_BT, params)
    except ImportError as error:
        packages = " ".join(PROCESSORS[kind].packages)
        raise UserError(f"{kind}: {error}: pip install {packages}") from error
    except (DropSample, UserError, OSError, MemoryError):
        raise
    except Exception as error:  # opuslib raises a bare Exception, networks what they like
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        detail = f"{kind}: {type(error).__name__}: {error}"
        raise DropSample("processor_failed", detail) from error
