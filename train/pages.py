"""What all HTML pages share: their templates, how numbers are written, the packages' versions."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from pathlib import Path

import jinja2

from data_specs.io.names import code, markdown

TEMPLATES = Path(__file__).parent / "templates"
VERSIONED = ("torch", "numpy", "scipy", "soundfile", "soxr", "distillmos", "webdataset", "ray")


def decimals(value: float | None) -> str:
    """Three decimals, or a dash where the value is not defined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def ranged(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """``0.856 [0.790, 0.910]``; a dash where there is no value, no brackets without interval."""
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def template(name: str) -> jinja2.Template:
    """One of ``train/templates``: HTML has what it is given escaped, Markdown escapes itself."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"decimals": decimals, "markdown": markdown, "code": code}
    made.globals.update(ranged=ranged, versions=versions())
    return made.get_template(name)
