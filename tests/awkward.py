"""A folder of audio as awkward as users have it, and what should become of each file."""

from __future__ import annotations

import io
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000
SECONDS = 1.25

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "WAV": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
}


def tone(number: int, seconds: float = SECONDS) -> np.ndarray:
    """Sound that no other number gives."""
    rng = np.random.default_rng(number)
    time_T = np.arange(round(seconds * RATE)) / RATE
    hum_T = 0.3 * np.sin(2 * np.pi * (200 + 3 * number) * time_T)
    return (hum_T + 0.02 * rng.standard_normal(len(time_T))).astype(np.float32)


def encoded(number: int, kind: str = "wav", seconds: float = SECONDS, subtype: str = "") -> bytes:
    """The bytes of a file of this ending."""
    made = io.BytesIO()
    form, usual = FORMATS[kind]
    soundfile.write(made, tone(number, seconds), RATE, format=form, subtype=subtype or usual)
    return made.getvalue()


def with_flac_total(data: bytes, change: Callable[[int], int]) -> bytes:
    """A FLAC whose header says another number of samples; 0 is "not known"."""
    packed = int.from_bytes(data[18:26], "big")
    total = packed & (1 << 36) - 1
    return data[:18] + (packed - total + change(total)).to_bytes(8, "big") + data[26:]


def with_data_size(data: bytes, size: int) -> bytes:
    """A WAV whose data chunk says another size."""
    place = data.index(b"data") + 4
    return data[:place] + struct.pack("<I", size) + data[place + 4 :]


def without_tag(mp3: bytes) -> bytes:
    """An MP3 without its first frame, which says how long it is."""
    return mp3[mp3.index(mp3[:2], 4) :]


@dataclass
class Awkward:
    """The folder; ``heard`` are files with their seconds, ``left_out`` words of the reason."""

    folder: Path
    heard: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def good(self, name: str, data: bytes, seconds: float = SECONDS) -> None:
        """A file that is to be heard."""
        self._write(name, data)
        self.heard[name] = seconds

    def bad(self, name: str, data: bytes, reason: str) -> None:
        """A file that is to be left out."""
        self._write(name, data)
        self.left_out[name] = reason

    def link(self, name: str, to: str, reason: str) -> None:
        """A link that adds nothing."""
        (self.folder / name).symlink_to(to)
        self.left_out[name] = reason

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def awkward(folder: Path) -> Awkward:
    """Make the folder: 200 entries and more."""
    made = Awkward(folder)
    _good(made)
    _lengths(made)
    _cut(made)
    _no_audio(made)
    _links(made)
    return made


def _good(made: Awkward) -> None:
    for number in range(100):
        ending = list(FORMATS)[number % len(FORMATS)]
        name = f"deep/{number % 7}/clip {number}.{ending if number % 2 else ending.upper()}"
        made.good(name, encoded(number, ending))
    for number, stem in enumerate(
        ("-dash", "quote'\"", "ümlaut", "日本", "a b", "=1+1", "#x", "%41")
    ):
        made.good(f"names/{stem}.wav", encoded(100 + number))
    made.good("/".join(["down"] * 40) + "/far.flac", encoded(110, "flac"))


def _lengths(made: Awkward) -> None:
    flac, wav, mp3, ogg = (
        encoded(120 + n, kind) for n, kind in enumerate(("flac", "wav", "mp3", "ogg"))
    )
    made.good("lengths/unknown.flac", with_flac_total(flac, lambda total: 0))
    made.bad("lengths/claims more.flac", with_flac_total(flac, lambda n: n ^ 1 << 30), "cut short")
    made.good("lengths/claims less.flac", with_flac_total(flac, lambda n: n // 2))
    for number, size in enumerate((0xFFFF_FFFF, 0x7FFF_FFFF, 0x8000_0000)):
        made.good(f"lengths/piped {number}.wav", with_data_size(wav, size))
    made.bad("lengths/claims more.wav", with_data_size(wav, 10 * len(wav)), "cut short")
    made.good("lengths/joined.mp3", mp3 + mp3, 2 * SECONDS)
    for ending in ("flac", "wav", "au", "caf", "aiff"):
        made.bad(f"lengths/joined.{ending}", encoded(129, ending) * 2, "")
    longer = encoded(119, "flac", 2.0)
    made.bad("lengths/joined to a longer one.flac", flac + longer, "damaged: several files")
    made.bad("lengths/joined to a shorter one.flac", longer + flac, "damaged: several files")
    made.good("lengths/without tag.mp3", without_tag(mp3))
    made.good("lengths/chained.ogg", ogg + encoded(124, "ogg", 1.0) + ogg, 1.0 + 2 * SECONDS)
    made.good("lengths/chained.opus", encoded(125, "opus") * 2, 2 * SECONDS)
    made.good("lengths/gsm.wav", encoded(126, "wav", subtype="GSM610"))
    made.good("lengths/adpcm.wav", encoded(127, "wav", subtype="IMA_ADPCM"))
    made.good("lengths/g721.au", encoded(128, "au", subtype="G721_32"))
    made.good("lengths/tagged.flac", flac + b"TAG" + bytes(125))
    made.good(
        "lengths/tagged.mp3", b"ID3\4\0\0\0\0\7\150" + bytes(1000) + mp3 + b"TAG" + bytes(125)
    )


def _cut(made: Awkward) -> None:
    for number, ending in enumerate(FORMATS):
        data = encoded(130 + number, ending, 2.0)
        for percent in (10, 50, 90):
            why = "cut short" if ending != "caf" and percent > 10 else ""
            made.bad(f"cut/{percent}.{ending}", data[: len(data) * percent // 100], why)
    made.bad("cut/header alone.flac", encoded(150, "flac")[:60], "")


def _no_audio(made: Awkward) -> None:
    made.bad("none/empty.wav", b"", "no audio header")
    made.bad("none/text.wav", b"these are not samples", "no audio header")
    made.bad("none/zeros.flac", bytes(4096), "no audio header")
    made.bad("none/page.mp3", b"<!DOCTYPE html><html>not found</html>", "no audio header")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 36612\n"
    made.bad("none/pointer.wav", lfs, "Git LFS pointer")
    made.bad("none/annex.flac", b"/annex/objects/SHA256E-s1--0.flac\n", "git-annex pointer")
    wav = encoded(151)
    made.bad("none/rate.wav", wav[:24] + struct.pack("<II", 1, 2) + wav[32:], "damaged")
    for ending in ("m4a", "M4A", "aac", "wma", "webm", "amr", "wv", "ape"):
        made.bad(f"none/other.{ending}", b"\0\0\0\x18ftypM4A ", "format not read")
    for number in range(12):
        made.bad(f"deep/{number % 7}/._clip {number}.wav", b"\0\5\26\7", "hidden")
    made.bad(".Trash/old.wav", wav, "hidden")
    made.left_out[".Trash"] = made.left_out.pop(".Trash/old.wav")
    for name in ("notes.md", "labels.csv", "deep/Thumbs.db"):
        (made.folder / name).write_bytes(b"no audio, and not called so")
    os.mkfifo(made.folder / "none/pipe.wav")
    made.left_out["none/pipe.wav"] = "not a file"
    with socket.socket(socket.AF_UNIX) as end:
        here = os.open(".", os.O_RDONLY)
        os.chdir(made.folder / "none")  # names of sockets are short
        try:
            end.bind("socket.flac")
        finally:
            os.fchdir(here)
            os.close(here)
    made.left_out["none/socket.flac"] = "not a file"


def _links(made: Awkward) -> None:
    outside = made.folder.parent / f"{made.folder.name}-outside"
    outside.mkdir()
    (outside / "far.wav").write_bytes(encoded(160))
    (outside / "back").symlink_to(made.folder)
    (made.folder / "linked").symlink_to(outside)
    made.heard["linked/far.wav"] = SECONDS
    made.left_out["linked/back"] = "there already"
    (outside / "alone.flac").write_bytes(encoded(161, "flac"))
    made.heard["linked/alone.flac"] = SECONDS
    made.link("deep/loop", "..", "there already")
    made.link("deep/0/loop", ".", "there already")
    made.link("up", "../..", "there already")
    made.link("again.wav", "names/a b.wav", "there already")
    made.link("dead.wav", "nowhere.wav", "dead link")
    made.link("dead", "nowhere", "dead link")
    made.link("round.wav", "round.wav", "dead link")
    made.link("to pipe.wav", "none/pipe.wav", "not a file")
    os.link(made.folder / "names/a b.wav", made.folder / "names/hard.wav")
    made.left_out["names/hard.wav"] = "there already"
    (made.folder / "device.wav").symlink_to("/dev/zero")
    made.left_out["device.wav"] = "not a file"
