"""Seeded mutations of files: what damage, other programs and strangers make of them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
NUMBERS += (1 << 36, (1 << 63) - 1, (1 << 64) - 1)

NAMES = (
    "../../x",
    "/etc/passwd",
    "a\x00b",
    "a\nb",
    "\x1b[31mred",
    "=1+1",
    "<script>alert(1)</script>",
    "x" * 5000,
    "\udc80",
    "..%2f..%2fx",
    "-rf",
    "con:",
    "",
)
DEEP = 100_000
VALUES: tuple[Any, ...] = (
    *(None, True, [], {}, "", "x", -1, 0, 1, 3.5, 1e9, 1e308, float("nan"), float("inf")),
    *(10**9, 10**12, 10**40, -(10**40), [1] * 1000, {"a": {"b": 1}}, *NAMES),
)
YAML_WORDS = (
    *("!!timestamp soon", "!!bool perhaps", "!!binary x", "!!python/object/apply:os.getcwd []"),
    *("!!int x", "!!set {a: b}", "&a [*a]", "*nothing", "{[1]: 2}", "0x", ".nan", ".inf", "1_0"),
    *("2001-13-99", "<<: *x", "!foo bar", "'", '"\\x', "\t", "|", "? [a]", "-", "@", "`", "~"),
)


# --- bytes ----------------------------------------------------------------------------------------


def flip(rng: random.Random, data: bytes) -> bytes:
    """Up to eight bits, near each other or anywhere."""
    made = bytearray(data)
    near = rng.randrange(len(data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.choice((near + rng.randrange(-16, 17), rng.randrange(len(data))))
        made[place % len(data)] ^= 1 << rng.randrange(8)
    return bytes(made)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Only a beginning, or all but it."""
    place = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 600))))
    return data[:place] if rng.random() < 0.8 else data[place:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """A piece over another, inserted, repeated, or filled with zeros."""
    first, to, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 4096)
    piece = rng.choice((data[first : first + size], bytes(size), rng.randbytes(size)))
    return data[:to] + piece + data[to + rng.choice((0, len(piece))) :]


def number(rng: random.Random, data: bytes) -> bytes:
    """An extreme number where a header may have one: in the first bytes, or anywhere."""
    made, value = bytearray(data), rng.choice(NUMBERS)
    kind = rng.choice("BHIQ")
    packed = struct.pack(rng.choice("<>") + kind, value & ((1 << 8 * struct.calcsize(kind)) - 1))
    place = rng.randrange(rng.choice((min(len(data), 128), len(data))))
    made[place : place + len(packed)] = packed
    return bytes(made)


def replace(rng: random.Random, data: bytes) -> bytes:
    """Another file altogether."""
    return rng.choice((b"", b"\0", rng.randbytes(1000), data * 2, data[::-1], b"\xff\xfe" + data))


def several(rng: random.Random, data: bytes) -> bytes:
    """Two or three of the others, one after another."""
    for _ in range(rng.randrange(2, 4)):
        data = rng.choice((flip, cut, splice, number))(rng, data or b"\0")
    return data


BYTES: tuple[Mutation, ...] = (flip, flip, cut, splice, number, number, replace, several)


def any_bytes(rng: random.Random, data: bytes) -> bytes:
    """One of the mutations that know nothing of the format."""
    return rng.choice(BYTES)(rng, data or b"\0")


# --- formats --------------------------------------------------------------------------------------


def tree(rng: random.Random, content: Any) -> Any:
    """JSON-like content with a value, a key or a branch changed, somewhere."""
    if isinstance(content, dict) and content and rng.random() < 0.85:
        key = rng.choice(sorted(content, key=str))
        rest = {k: v for k, v in content.items() if k != key}
        what = rng.random()
        if what < 0.08:
            return rest
        if what < 0.16:
            return rest | {rng.choice(NAMES): content[key]}
        return content | {key: tree(rng, content[key])}
    if isinstance(content, list) and content and rng.random() < 0.85:
        place = rng.randrange(len(content))
        changed = tree(rng, content[place])
        return rng.choice((content[:place], content * 3, [*content[:place], changed]))
    return rng.choice(VALUES)


def as_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON file of the right form with wrong content; deep nesting; or damaged bytes."""
    what = rng.random()
    if what < 0.25:
        return any_bytes(rng, data)
    if what < 0.3:
        return rng.choice((b"[", b'{"a":')) * DEEP
    return json.dumps(tree(rng, json.loads(data))).encode("utf-8", "surrogatepass")


def as_yaml(rng: random.Random, data: bytes) -> bytes:
    """A line's value replaced, a line moved, deep nesting, or damaged bytes."""
    what, lines = rng.random(), data.decode().split("\n")
    place = rng.randrange(len(lines))
    if what < 0.25:
        return any_bytes(rng, data)
    if what < 0.28:
        return rng.choice((b"[", b"{a: ")) * rng.choice((1000, DEEP))
    if what < 0.4:
        lines.insert(rng.randrange(len(lines)), lines.pop(place))
    else:
        words = (*YAML_WORDS, *(json.dumps(value, ensure_ascii=True) for value in VALUES))
        key, colon, _ = lines[place].partition(":")
        lines[place] = f"{key}{colon} {rng.choice(words)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def as_table(rng: random.Random, data: bytes) -> bytes:
    """A cell, a line or a separator of a CSV or a list changed, or damaged bytes."""
    if rng.random() < 0.25:
        return any_bytes(rng, data)
    ending = rng.choice(("\n", "\r\n", "\r"))
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    cells = lines[place].split(",")
    cells[rng.randrange(len(cells))] = str(rng.choice(VALUES))
    lines[place] = rng.choice((",", ",", ";")).join(cells)
    if rng.random() < 0.2:
        lines.insert(place, lines[rng.randrange(len(lines))])
    mark = "\ufeff" if rng.random() < 0.2 else ""
    return (mark + ending.join(lines)).encode("utf-8", "surrogateescape")


def as_tar(rng: random.Random, data: bytes) -> bytes:
    """A member's header with another name, size or type, under a right checksum; or bytes."""
    if rng.random() < 0.4 or len(data) < 1024:
        return any_bytes(rng, data)
    made, starts = bytearray(data), [p for p in range(0, len(data), 512) if data[p + 257 : p + 262]]
    starts = [place for place in starts if data[place + 257 : place + 262] == b"ustar"]
    if not starts:
        return any_bytes(rng, data)
    at = rng.choice(starts)
    field, size = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155), (108, 8)))
    value = {
        124: rng.choice((b"77777777777\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"-0000000001\0")),
        156: rng.choice((b"0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"\xff")),
    }.get(field, rng.choice(NAMES).encode("utf-8", "surrogateescape"))
    made[at + field : at + field + size] = value[:size].ljust(size, b"\0")
    made[at + 148 : at + 156] = b" " * 8
    made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    return bytes(made)


def as_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The JSON header changed and its length set right; or damaged bytes."""
    if rng.random() < 0.5 or len(data) < 9:
        return any_bytes(rng, data)
    (size,) = struct.unpack("<Q", data[:8])
    header = as_json(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


FORMATS: dict[str, Mutation] = {
    ".json": as_json,
    ".yaml": as_yaml,
    ".csv": as_table,
    ".txt": as_table,
    ".tar": as_tar,
    ".safetensors": as_safetensors,
}


def mutated(rng: random.Random, name: str, data: bytes) -> bytes:
    """A mutation that fits the file's ending; never the same bytes."""
    ending = name[name.rfind(".") :] if "." in name else ""
    for _ in range(100):
        made = FORMATS.get(ending, any_bytes)(rng, data)
        if made != data:
            return made
    return data + b"x"
