"""Checksums of an upload, compared with what the store states."""

from __future__ import annotations

import base64
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_specs.io.files import path_of, scratch_file, sha256_of


@dataclass(frozen=True)
class Sums:
    """What a store may say of a file: its size and any of these hashes (hex)."""

    size: int
    sha256: str
    md5: str
    of_parts: str
    """S3's tag of an object that came in parts: the MD5 of the parts' MD5s, and how many."""

    @classmethod
    def of(cls, path: Path, part_bytes: int) -> Sums:
        """Read a file once; ``part_bytes`` are those of an upload in parts."""
        whole, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        part, parts, size = hashlib.md5(usedforsecurity=False), [], 0
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                for digest in (whole, md5, part):
                    digest.update(block)
                size += len(block)
                if size % part_bytes == 0:
                    parts.append(part.digest())
                    part = hashlib.md5(usedforsecurity=False)
        if size % part_bytes:
            parts.append(part.digest())
        of_parts = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
        return cls(size, whole.hexdigest(), md5.hexdigest(), f"{of_parts}-{len(parts)}")


def require_stored(system: Any, at: str, sums: Sums) -> None:
    """``OSError`` where a store does not hold what was sent.

    By size, and by the checksum that it states. One that states none, or another (an encrypted
    object's tag is no MD5), is read back.
    """
    system.invalidate_cache()
    entry = system.info(at)
    if entry["size"] != sums.size:
        raise OSError(f"{entry['size']} of {sums.size} bytes arrived")
    if _stated(entry) & {sums.sha256, sums.md5, sums.of_parts}:
        return
    with scratch_file() as file:
        system.get_file(at, str(path_of(file)))
        if sha256_of(path_of(file)) != sums.sha256:
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
