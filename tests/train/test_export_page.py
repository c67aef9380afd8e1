"""The page that scores recordings in a browser, driven as a person would: a file is chosen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.tolerance import STUDENT

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.conftest import ROOT, talk
from tests.export_helpers import tiny
from train.export.onnx_file import write_onnx
from train.export.page import HOW_TO_GET, SCRIPT, as_worker_script, read_runtime, write_page
from train.scoring.base import Scorer
from train.scoring.onnx_scorer import Facts, OnnxScorer

DIST = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "node_modules" / "onnxruntime-web" / "dist"))
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

needs_runtime = pytest.mark.skipif(
    not (DIST / SCRIPT).is_file(), reason=f"no onnxruntime-web at {DIST} (ONNXRUNTIME_WEB)"
)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium on the PATH")

FACTS = Facts(model="tiny <b>", weights_sha256="0" * 64, version="1", precision="fp32")


@pytest.fixture(scope="module", params=[("zero", "soft"), ("repeat", "sharp")])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "model.onnx"
    hears = dict(zip(("padding", "resampler"), request.param, strict=True))
    write_onnx(path, tiny(), FACTS.model_copy(update=hears))
    return path


@pytest.fixture(scope="module")
def page(model: Path) -> Iterator[Any]:
    """The page, opened from disk in Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    made = write_page(model.parent, model, read_runtime(DIST))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 390, "height": 844})
        opened.asked = []
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.goto(made.as_uri())
        opened.wait_for_selector("body[data-ready]", timeout=90_000)
        yield opened
        browser.close()


def score_on(page: Any, path: Path) -> float:
    page.evaluate("() => { document.querySelector('#result').hidden = true; }")
    page.set_input_files("#picker", path)
    page.wait_for_selector("#result:not([hidden])", timeout=60_000)
    return float(page.get_attribute("#score", "data-mos"))


@needs_runtime
@needs_browser
@pytest.mark.parametrize(
    ("name", "rate", "seconds"),
    [
        ("short.wav", 16_000, 2.0),
        ("long.wav", 16_000, 11.37),
        ("music-rate.wav", 44_100, 3.3),
        ("telephone.wav", 8_000, 4.1),
        ("studio.flac", 48_000, 9.0),
    ],
)
def test_the_page_scores_as_python(
    page: Any, model: Path, tmp_path: Path, name: str, rate: int, seconds: float
) -> None:
    wave = talk(seconds, seed=rate, rate_hz=rate)
    wave += np.float32(0.02 * seconds) * np.random.default_rng(0).standard_normal(len(wave)).astype(
        "f4"
    )
    soundfile.write(tmp_path / name, np.stack((wave, -0.1 * wave), 1), rate)  # the first channel
    scorer: Scorer = OnnxScorer(model)
    (own,) = scorer.score_files([tmp_path / name])
    assert own.mos is not None
    assert score_on(page, tmp_path / name) == pytest.approx(own.mos, abs=STUDENT)
    assert page.inner_text("#file").startswith(name)


@needs_runtime
@needs_browser
def test_the_page_tells_errors_fetches_nothing_and_fits_a_phone(page: Any, tmp_path: Path) -> None:
    (tmp_path / "no.wav").write_text("this is no recording")
    page.set_input_files("#picker", tmp_path / "no.wav")
    page.wait_for_selector("#error:not([hidden])", timeout=20_000)
    assert "no.wav: not a recording that this browser can decode" in page.inner_text("#error")
    assert {url.partition(":")[0] for url in page.asked} <= {"file", "blob"}
    assert len([url for url in page.asked if url.startswith("file:")]) == 1
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert "tiny <b>, fp32" in page.inner_text("footer")


def test_the_runtimes_module_becomes_a_script() -> None:
    module = "var a=1,b=import.meta.url;export{a as default,b as env};\n//# sourceMappingURL=x\n"
    assert as_worker_script(module) == (
        '"use strict";var a=1,b="https://page.invalid/ort.mjs";self.ort={"default":a,"env":b};'
    )
    with pytest.raises(ValueError, match="no list of exports"):
        as_worker_script("var a=1;")


def test_without_the_runtime_the_command_is_told(tmp_path: Path) -> None:
    for dist in (None, tmp_path):
        with pytest.raises(ValueError, match="npm install onnxruntime-web") as caught:
            read_runtime(dist)
        assert HOW_TO_GET in str(caught.value)
