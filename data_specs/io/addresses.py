"""Addresses of folders: which are read, and how messages show them.

Addresses may carry credentials, so every message shows them through ``redacted``, and what a
backend says, which quotes addresses, passes ``scrubbed``.
"""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_specs.io.errors import UserError
from data_specs.io.names import visible

PACKAGES = {
    "http": "'fsspec[http]'",
    "https": "'fsspec[http]'",
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
"""Remote protocols that are read, and what to install for each. No other is: fsspec knows some that
run commands, unpack archives or log in elsewhere."""

SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|API_KEY")
"""Environment variables of such names are never told, whoever quotes their values."""

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")

SECRET_LENGTH = 8
"""Characters; to blot out every shorter value would make messages unreadable."""

PathOrUrl = Path | str
"""A folder: its path on this machine, or its address."""


def is_address(text: object) -> bool:
    """Whether it is an address that fsspec reads, not a path."""
    return isinstance(text, str) and "://" in text and not text.startswith("file://")


def path_or_url(text: str) -> PathOrUrl:
    """Read a path or an address of a command line. ``ValueError`` for one that is not read."""
    if is_address(text):
        require_readable(text)
        return text
    return local_path(text) if text.startswith("file://") else Path(text)


def path_here(text: str) -> Path:
    """A path of this machine, for command lines. ``ArgumentTypeError`` for an address: as a path it
    would be a folder called ``s3:`` here, which is gone with the machine."""
    if is_address(text):
        raise ArgumentTypeError(f"{redacted(text)}: only a path of this machine can be given here")
    return Path(path_or_url(text))


def shown(where: PathOrUrl) -> str:
    """A path or address as messages may show it, whatever its name holds."""
    return visible(redacted(where) if isinstance(where, str) else where)


def redacted(address: str) -> str:
    """An address as messages may show it: without user, password, query and fragment."""
    scheme, found, rest = address.partition("://")
    if not found:
        return address
    if not re.fullmatch(r"[A-Za-z][\w+.-]*", scheme):
        return "***"
    host, slash, path = rest.partition("/")
    host = re.split("[?#]", host.rpartition("@")[2])[0]
    if not re.fullmatch(r"\[[^\]]*\](:\d*)?|[^:]*(:\d*)?", host):
        return f"{scheme}://***"  # an unescaped slash in a password: what follows is part of it
    return f"{scheme}://{host}{slash}{re.split('[?#]|::', path)[0]}"


def redacted_in(text: str) -> str:
    """A text with every address in it as messages may show it."""
    return ADDRESS.sub(lambda found: redacted(found[0]), text)


def has_secret(text: str) -> bool:
    """Whether an address in a text has a login or a query, which may be a signature."""
    return any(re.search(r"//[^/?#]*@|[?]", found) for found in ADDRESS.findall(text))


def scrubbed(text: str, address: str) -> str:
    """A backend's message without what is secret about an address in it, and not too long."""
    text = redacted_in(text)
    authority = address.partition("://")[2].partition("/")[0]
    login, query = authority.rpartition("@")[0], address.partition("?")[2]
    values = [pair.partition("=")[2] for pair in query.split("&")]
    told = [value for name, value in os.environ.items() if SECRET_NAMES.search(name.upper())]
    values += [value for value in told if len(value) >= SECRET_LENGTH]
    for secret in (query, login, login.partition(":")[2], *values):
        for spelling in {secret, unquote(secret)} - {""}:
            text = text.replace(spelling, "***")
    return text if len(text) < 300 else text[:300] + "..."


def require_readable(address: str) -> None:
    """``ValueError`` for a protocol that is not read, and for what only another would need."""
    protocol, _, rest = address.partition("://")
    seen = redacted(address)
    if "::" in re.sub(r"\[[0-9A-Fa-f:.]*\]", "", address, count=1):  # but not in an IPv6 address
        raise UserError(f"{seen}: chained addresses (::) are not read: give a plain one")
    if protocol not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise UserError(f"{seen}: such addresses are not read: give a local folder, or {known}")
    if protocol not in ("http", "https") and "@" in rest.partition("/")[0]:
        raise UserError(f"{seen}: credentials belong into the environment, not into the address")


def require_package(address: str) -> None:
    """``ValueError`` naming what to install for an address of this protocol."""
    protocol = address.partition("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]

        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise UserError(
            f"{redacted(address)}: reading {protocol}:// needs a package: "
            f"pip install {PACKAGES[protocol]}"
        ) from None


def local_path(address: str) -> Path:
    """The path of ``file:///folder``. ``ValueError`` where it names another machine."""
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{redacted(address)}: names another machine; spell it file:///folder")
    return Path(unquote(parts.path))
