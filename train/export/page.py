"""One static page that scores what is dropped on it: network, runtime and script in one file.

Nothing is fetched, not even from the page's own folder, so it works from ``file://``.
"""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.parse import json_object
from train.pages import TEMPLATES, template
from train.scoring.onnx_scorer import facts_of, open_session

SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
"""Of onnxruntime-web's ``dist`` folder: the part for the CPU alone."""

HOW_TO_GET = "npm install onnxruntime-web, then --onnxruntime-web node_modules/onnxruntime-web/dist"
PAGE = "index.html"
MADE_BY = b'<meta name="generator" content="distill-mos-factory">'
"""In every page that is written here."""


def packed(data: bytes) -> str:
    """Gzip in base64: what the page's script unpacks. The same bytes give the same text."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode("ascii")


def as_worker_script(module: str) -> str:
    """onnxruntime-web's module as a plain script that sets ``self.ort``.

    A page opened from disk has no origin, and browsers let its workers load no module at all.
    ``ValueError`` if the module does not end with the one list of exports that it always had.
    """
    found = re.search(r"export\{([^{}]*)\};?\s*(//#[^\n]*)?\s*\Z", module)
    if not found:
        raise UserError(f"{SCRIPT}: no list of exports at its end: take onnxruntime-web 1.30")
    pairs = (name.strip().split(" as ") for name in found[1].split(","))
    members = ",".join(f'"{pair[-1]}":{pair[0]}' for pair in pairs)
    body = module[: found.start()].replace("import.meta.url", '"https://page.invalid/ort.mjs"')
    return f'"use strict";{body}self.ort={{{members}}};'


def read_runtime(dist: Path | None) -> dict[str, str]:
    """onnxruntime-web's version, and its script and wasm, packed, from its ``dist`` folder.

    ``ValueError`` saying how to get it.
    """
    if dist is None:
        raise UserError(f"a page needs onnxruntime-web: {HOW_TO_GET}")
    missing = [name for name in (SCRIPT, WASM) if not (dist / name).is_file()]
    if missing:
        raise UserError(f"{dist}: no {', '.join(missing)}; get them: {HOW_TO_GET}")
    package = dist.parent / "package.json"
    about = json_object(package.read_bytes(), package, HOW_TO_GET) if package.is_file() else {}
    script, wasm = ((dist / name).read_bytes() for name in (SCRIPT, WASM))
    worker = as_worker_script(script.decode("utf-8")).encode("utf-8")
    version = str(about.get("version", "unknown"))
    return {"version": version, "script": packed(worker), "wasm": packed(wasm)}


def require_own(folder: Path) -> None:
    """``UserError`` where writing the page would overwrite another one."""
    path = folder / PAGE
    if path.is_file() and MADE_BY not in path.read_bytes():
        raise UserError(f"{path}: is another page; it would be lost: give another --web")


def write_page(folder: Path, model: Path, runtime: Mapping[str, str]) -> Path:
    """Write ``index.html`` for an exported model into a folder; its path."""
    metadata = open_session(model, threads=1).get_modelmeta().custom_metadata_map
    facts = facts_of(metadata, model)
    text = template("score_page.html.j2").render(
        facts=facts,
        runtime=runtime,
        model=packed(model.read_bytes()),
        code=Markup((TEMPLATES / "score_page.js").read_text("utf-8")),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PAGE, text)
    return folder / PAGE
