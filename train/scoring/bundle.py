"""A model as it is passed on: one folder with weights, card, ONNX files and their checksums.

``python -m train export`` writes such a folder, ``train.scoring.score.load`` reads it as it reads a
run's. ``fetch`` brings one here from an address: ``https://host/folder``,
``hf://org/name[@revision]``, ``s3://``, ``gs://``; only the files that are wanted, verified, and
kept for when there is no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from data_specs.io.addresses import local_path, redacted
from data_specs.io.cache import CACHE_FOLDER_VARIABLE, RemoteFile, default_cache
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, whole_file, write_atomically, write_text
from data_specs.io.storage import NotFound, RemoteFolder, open_folder
from data_specs.strict import Strict

CHECKSUMS = "checksums.json"
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
ONNX, ONNX_INT8 = "model.onnx", "model.int8.onnx"
CARD, PARITY, PARITY_TEXT = "README.md", "parity.json", "parity.md"

TO_LOAD = (WEIGHTS, DESCRIPTION)
FILES = (*TO_LOAD, CARD, ONNX, ONNX_INT8, PARITY, PARITY_TEXT)
"""All that a bundle may hold. A name that is not here is never fetched."""

MOST_CHECKSUMS_BYTES = 1 << 16
MOST_FILE_BYTES = 8 << 30

HUB = "hf://"


class Entry(Strict):
    """One file of a bundle."""

    bytes: Annotated[int, Field(ge=0, le=MOST_FILE_BYTES)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Checksums(Strict):
    """``checksums.json``: every other file of a bundle."""

    files: dict[str, Entry]

    def entry(self, name: str, where: str) -> Entry:
        """Of a file; ``ValueError`` naming it if the bundle has none."""
        if name not in self.files:
            raise UserError(f"{where}: the bundle has no {name} (it has {', '.join(self.files)})")
        return self.files[name]


# ---------------------------------------------------------------- here


def write_checksums(folder: Path) -> None:
    """``checksums.json`` of the bundle's files that a folder holds, a wheel among them."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    found += sorted(folder.glob("*.whl"))
    files = {path.name: Entry(bytes=path.stat().st_size, sha256=sha256_of(path)) for path in found}
    write_text(folder / CHECKSUMS, Checksums(files=files).model_dump_json(indent=1) + "\n")


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """Hold a bundle's files (all, or these) to its checksums; ``ValueError`` naming a bad one."""
    path = folder / CHECKSUMS
    if not path.is_file():
        raise UserError(f"{path} is missing: is this what `python -m train export` wrote?")
    sums = _parsed(path.read_bytes(), str(path))
    for name in sums.files if names is None else names:
        entry = sums.entry(name, str(folder))
        if not _is_whole(folder / name, entry):
            raise UserError(f"{folder / name}: missing or not what {CHECKSUMS} says: get it again")


def verify_model(path: Path) -> None:
    """Hold a model file, and its description, to the checksums beside them, if it is a bundle's."""
    if (path.parent / CHECKSUMS).is_file():
        verify(path.parent, TO_LOAD if path.name == WEIGHTS else (path.name,))


def require_replaceable(folder: Path) -> None:
    """``UserError`` unless a folder is not there, empty, or a bundle that nobody has changed."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder: give another --out")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return
    path = folder / CHECKSUMS
    sums = _parsed(path.read_bytes(), str(path)).files if path.is_file() else {}
    extra = sorted(names - {CHECKSUMS, *sums}) if sums else sorted(names)
    changed = [name for name, entry in sums.items() if not _is_whole(folder / name, entry)]
    if extra or changed:
        what = f"{extra[0]} is there" if extra else f"{changed[0]} was changed since"
        raise UserError(
            f"{folder}: not a bundle as `python -m train export` left it ({what}); it would be "
            "lost: give another --out, or move it away"
        )


def _is_whole(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256


def _parsed(data: bytes, where: str) -> Checksums:
    try:
        return Checksums.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a bundle's checksums; export it again") from error


# ---------------------------------------------------------------- elsewhere


def fetch(address: str, name: str | None = None) -> Path:
    """Return a bundle's folder on this machine; or its file ``name``, or that the address ends in.

    ``https://host/folder``, ``https://host/folder/model.onnx``, ``hf://org/name@revision``. What
    is here already is not fetched again; without a network, what was fetched last is used, and a
    warning says so. ``ValueError`` or ``OSError`` naming the address, without its credentials.
    """
    address, meant = _split(address)
    name = name or meant
    wanted = (name,) if name else TO_LOAD
    if address.startswith(HUB):
        folder = _from_hub(address, wanted)
    elif address.startswith("file://"):
        folder = local_path(address)
        verify(folder, wanted)
    else:
        folder = _from_store(address, wanted)
    return folder / name if name else folder


def _split(address: str) -> tuple[str, str | None]:
    """``https://host/bundle/model.onnx`` as folder, with the query, and file, if one is meant."""
    plain, mark, query = address.partition("?")
    folder, _, last = plain.rstrip("/").rpartition("/")
    if last in FILES and "://" in folder:
        return folder + mark + query, last
    return address, None


def cache_folder() -> Path:
    """Where fetched bundles are kept: ``SPEECH_CACHE``/models, or the user's cache folder."""
    shards = default_cache().folder
    return (shards if os.environ.get(CACHE_FOLDER_VARIABLE) else shards.parent) / "models"


def _from_store(address: str, wanted: Iterable[str]) -> Path:
    remote = open_folder(address)
    assert isinstance(remote, RemoteFolder)
    data = _checksums_of(remote)
    sums = _parsed(data, remote.shown(CHECKSUMS))
    # By content: a bundle that was exported anew is another folder, and nothing is mixed.
    folder = cache_folder() / hashlib.sha256(data).hexdigest()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in wanted:
        _bring(remote, name, sums.entry(name, remote.shown()), folder / name)
    with whole_file(folder / CHECKSUMS) as file:
        file.write(data)
    return folder


def _checksums_of(remote: RemoteFolder) -> bytes:
    """Its checksums as they are now, else as they were seen last."""
    digest = hashlib.sha256(remote.address.encode()).hexdigest()
    last = cache_folder() / f"{digest}.seen.json"
    try:
        (data,) = remote.read([CHECKSUMS], MOST_CHECKSUMS_BYTES)
    except NotFound as error:
        raise UserError(f"{error}: no bundle there (`python -m train export` makes one)") from None
    except OSError as error:
        if not last.is_file():
            raise
        print(f"warning: {error}; using what was fetched last", file=sys.stderr)
        return last.read_bytes()
    last.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with whole_file(last) as file:
        file.write(data)
    return data


def _bring(remote: RemoteFolder, name: str, entry: Entry, to: Path) -> None:
    if _is_whole(to, entry):
        return
    file = RemoteFile(remote, name, entry.bytes, entry.sha256, default_cache())
    write_atomically(to, lambda part: remote.fetch(name, part, file.check, entry.bytes))


# ---------------------------------------------------------------- the hub


def _from_hub(address: str, wanted: Iterable[str]) -> Path:
    """The hub's own client keeps the files, logs in and works offline; they are verified here."""
    import huggingface_hub

    repository, revision = _repository(address)
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=[*wanted, CHECKSUMS]
        )
    except Exception as error:  # the hub's kinds are its own, and quote addresses
        raise OSError(
            f"{HUB}{repository}: cannot be fetched: {type(error).__name__}; check the name, "
            "the revision, the network and, for a private repository, the hub's token in the "
            "environment"
        ) from None
    verify(Path(folder), wanted)
    return Path(folder)


def _repository(address: str) -> tuple[str, str | None]:
    """("org/name", revision) of ``hf://org/name[@revision]``."""
    name, _, revision = address.removeprefix(HUB).strip("/").partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{redacted(address)}: spell it hf://org/name or hf://org/name@revision")
    return name, revision or None
