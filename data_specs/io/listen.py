"""How a sample is shown to people: its plan in words, its audio and spectrogram as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.sample import SAMPLE_RATE

UNITS = {"hz": "Hz", "db": "dB", "bps": "bit/s", "kbps": "kbit/s", "ms": "ms"}
"""How the last part of a parameter's name is written as a unit."""


def in_words(plan: Mapping[str, Any]) -> list[str]:
    """Every step of a plan in its order, one phrase each; unknown parts are left out."""
    words = [_speech(plan["speech"])] if plan.get("speech") else []
    if plan.get("speed", 1) != 1:
        words.append(f"speed x {plan['speed']:.2f}")
    steps = list(plan.get("steps") or [])
    before = int(plan.get("speech_steps", 0))
    words += [_step(step) for step in steps[:before]]
    if plan.get("room"):
        words.append(f"room {plan['room']['path']}")
    if plan.get("noise"):
        words.append(f"noise {plan['noise']['path']} at {plan['noise']['snr_db']:.1f} dB SNR")
    words += [_step(step) for step in steps[before:]]
    if "level_dbfs" in plan:
        words.append(f"level {plan['level_dbfs']:.1f} dBFS")
    return words


def _speech(speech: Mapping[str, Any]) -> str:
    seconds = speech.get("start_sample", 0) / SAMPLE_RATE
    who = " ".join(str(speech[key]) for key in ("language", "speaker") if speech.get(key))
    return f"speech {speech['path']} from {seconds:.1f} s" + (f" ({who})" if who else "")


def _step(step: Mapping[str, Any]) -> str:
    params = _settings(step.get("params", {}))
    what = "nothing" if step["kind"] == "none" else step["kind"].replace("_", " ")
    return f"{step['stage'].replace('_', ' ')}: {what}" + (f" ({params})" if params else "")


def _settings(params: Mapping[str, float]) -> str:
    """A few settings one by one; a whole curve of them (an equaliser's) by its range."""
    hidden = {"pattern"} if params.get("loss", 1) else {"pattern", "loss", "conceal"}
    shown = {name: value for name, value in params.items() if name not in hidden}
    units = {split_unit(name)[1] for name in shown}
    if len(shown) > 4 and len(units) == 1:
        (unit,) = units
        low, high = min(shown.values()), max(shown.values())
        return f"{len(shown)} values, {low:.1f} to {high:.1f} {unit}".rstrip()
    return ", ".join(quantity(name, value) for name, value in shown.items())


def quantity(name: str, value: float) -> str:
    """A parameter in words: ``bitrate_bps`` and 24000 give "bitrate 24000 bit/s"."""
    what, unit = split_unit(name)
    number = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{what} {number}" + (f" {unit}" if unit else "")


def split_unit(name: str) -> tuple[str, str]:
    """Words and unit of a parameter's name; the unit is empty where it names none."""
    stem, _, last = name.rpartition("_")
    if stem and last in UNITS:
        return stem.replace("_", " "), UNITS[last]
    return name.replace("_", " "), ""


def data_uri(kind: str, content: bytes) -> str:
    """``data:`` address of ``content`` with the media type ``kind``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def spectrogram_png(
    pcm: NDArray[np.int16], width: int = 512, height: int = 128, range_db: float = 70.0
) -> bytes:
    """A PNG of ``width`` x ``height``: time to the right, 0 to 8 kHz upwards, below the peak."""
    window = np.hanning(2 * height)
    wave = np.pad(pcm.astype(np.float64) / 32768, (0, max(0, len(window) - len(pcm))))
    starts = np.linspace(0, len(wave) - len(window), width).astype(int)
    frames = wave[starts[:, None] + np.arange(len(window))] * window
    magnitude = np.abs(np.fft.rfft(frames, axis=1))[:, :height].T[::-1]
    level_db = 20 * np.log10(np.maximum(magnitude, 1e-9))
    brightness = np.clip(1 + (level_db - level_db.max()) / range_db, 0, 1)
    from matplotlib.image import imsave  # here: it takes a second, and workers need none of it

    png = io.BytesIO()
    look: dict[str, Any] = {"cmap": "inferno", "vmin": 0, "vmax": 1}
    look["metadata"] = {"Software": None}  # no version of matplotlib in the file
    imsave(png, brightness, format="png", **look)
    return png.getvalue()
