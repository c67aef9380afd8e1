"""Checksums of an upload, compared with what the store states."""

from __future__ import annotations

import base64
import hashlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from data_specs.io.files import path_of, scratch_file, sha256_of

BLOCK_BYTES = 1 << 20

_md5 = partial(hashlib.md5, usedforsecurity=False)


def sums_of(path: Path, part_bytes: int) -> tuple[int, set[str]]:
    """Bytes of a file, and the hashes (hex) that a store may state of it: SHA-256, MD5, and of an
    upload in parts (of so many blocks) S3's tag: the MD5 of the parts' MD5s, and how many."""
    whole, md5, size = hashlib.sha256(), _md5(), 0
    parts: list[Any] = []
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            if size % part_bytes == 0:
                parts.append(_md5())
            for digest in (whole, md5, parts[-1]):
                digest.update(block)
            size += len(block)
    of_parts = _md5(b"".join(part.digest() for part in parts)).hexdigest()
    return size, {whole.hexdigest(), md5.hexdigest(), f"{of_parts}-{len(parts)}"}


def require_stored(system: Any, at: str, size: int, sums: set[str]) -> None:
    """``OSError`` where a store does not hold what was sent.

    By size, and by the checksum that it states. One that states none, or another (an encrypted
    object's tag is no MD5), is read back.
    """
    system.invalidate_cache()
    entry = system.info(at)
    if entry["size"] != size:
        raise OSError(f"{entry['size']} of {size} bytes arrived")
    if _stated(entry) & sums:
        return
    with scratch_file() as file:
        system.get_file(at, str(path_of(file)))
        if sha256_of(path_of(file)) not in sums:
            raise OSError("what is stored there is not what was sent")


def _stated(entry: dict[str, Any]) -> set[str]:
    """The checksums in a store's word for a file: s3's tag, gs' MD5, hf's SHA-256."""
    found = {str(entry.get("ETag") or "").strip('"')}
    with suppress(ValueError):
        found.add(base64.b64decode(entry.get("md5Hash") or "", validate=True).hex())
    lfs = entry.get("lfs")
    if isinstance(lfs, dict):
        found.add(str(lfs.get("sha256")))
    return found - {""}
