"""Shards that someone made to do harm: refused by name, never unpacked or run, memory bounded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data_specs.io.tars import index_of
from tests.train_helpers import flac_bytes, members_of, record, tone_pcm, write_tar
from train.data.shards import list_shards, read_dataset_info
from train.data.stream import ShardSamples

FLAC = flac_bytes(tone_pcm(0))
PICKLE = b"cos\nsystem\n(S'touch pwned'\ntR."


def label(**changes: Any) -> bytes:
    return json.dumps(record("a", 3.0, tone_pcm(0)) | changes).encode()


def shard(folder: Path, data: bytes, samples: int | None = 1) -> Path:
    """A folder with one shard of these bytes; its record fits."""
    (folder / "shard-000000.tar").write_bytes(data)
    content = {"tar_bytes": len(data)} | ({} if samples is None else {"samples": samples})
    (folder / "shard-000000.json").write_text(json.dumps(content))
    return folder


def tar_of(
    *members: tarfile.TarInfo | tuple[str, bytes],
    format: int = tarfile.USTAR_FORMAT,
    **changes: Any,
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                archive.addfile(plain(*member, **changes), io.BytesIO(member[1]))
    return buffer.getvalue()


def plain(name: str, data: bytes = b"", **changes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in changes.items():
        setattr(info, attribute, value)
    return info


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    return plain(name, type=kind, linkname=target)


def refused(folder: Path, message: str) -> None:
    """Reading is a ``ValueError`` with the tar's name, and writes nothing."""
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        samples = ShardSamples(list_shards(folder))
        for number in range(len(samples)):
            samples.read(number)
    assert "shard-000000" in str(caught.value) and len(str(caught.value)) < 1000
    assert sorted(path.name for path in folder.rglob("*")) == before


# ---------------------------------------------------------------- members


GOOD = (("a.flac", FLAC), ("a.json", label()))


@pytest.mark.parametrize(
    "name",
    [
        *("../a.flac", "../../etc/cron.d/x.json", "/etc/a.json", "x/a.flac", "./a.flac"),
        *("a.pickle", "a.pth", "a.pyd", "a.flac.pth", "a.FLAC", "a", ".flac", "a\n.flac"),
        *("a.flac ", "a\\b.json", "é.flac"),
    ],
)
def test_a_member_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    refused(shard(tmp_path, tar_of(*GOOD, (name, PICKLE))), "unexpected member")
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "member",
    [
        link("a.flac", tarfile.SYMTYPE),
        link("a.json", tarfile.LNKTYPE),
        link("a.flac", tarfile.SYMTYPE, "../../x"),
        plain("a.flac", type=tarfile.CHRTYPE),
        plain("a.flac", type=tarfile.FIFOTYPE),
        plain("a.flac", type=tarfile.DIRTYPE),
        plain("a.flac", type=tarfile.GNUTYPE_SPARSE),
        plain("a.flac", type=tarfile.GNUTYPE_LONGNAME),
        plain("a.flac", type=tarfile.CONTTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.type.decode()}",
)
def test_only_plain_files_are_read(tmp_path: Path, member: tarfile.TarInfo) -> None:
    data = tar_of(member, ("a.json", label()))
    refused(shard(tmp_path, data), r"unexpected member 'a\.\w+/?' of type")


@pytest.mark.parametrize(("lost", "what"), [("a.flac", "audio"), ("a.json", "label")])
def test_a_member_that_is_missing_is_named(tmp_path: Path, lost: str, what: str) -> None:
    data = tar_of(*(member for member in GOOD if member[0] != lost))
    refused(shard(tmp_path, data), f"sample a has no {what}: member {lost} is missing")


@pytest.mark.parametrize("name", ["a.flac", "a.json"])
def test_a_member_twice_is_refused(tmp_path: Path, name: str) -> None:
    data = tar_of(*GOOD, (name, dict(GOOD)[name]))
    refused(shard(tmp_path, data), rf"member {name} is there twice")


@pytest.mark.parametrize(
    "order",
    [
        lambda m: [m[i ^ 1] for i in range(len(m))],
        lambda m: sorted(m, key=lambda member: member[0][-4:]),
        lambda m: m[::-1],
    ],
    ids=["json first", "all flac, then all json", "backwards"],
)
def test_members_in_any_order_are_read(
    tmp_path: Path, order: Callable[[list[Any]], list[Any]]
) -> None:
    write_tar(tmp_path / "shard-000000.tar", order(members_of(range(3))), 3)
    samples = ShardSamples(list_shards(tmp_path))
    keys = [samples.record(number).key for number in range(3)]
    assert sorted(keys) == ["00000000", "00000001", "00000002"]
    for number, key in enumerate(keys):
        assert (samples.read(number)[0] == tone_pcm(int(key))).all()


# ---------------------------------------------------------------- headers


def resized(data: bytes, text: bytes, at: int = 0) -> bytes:
    """The header at a byte with another size field and the checksum that fits it."""
    header = bytearray(data[at : at + 512])
    header[124:136] = text.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"77777777777", "bytes go past the end"),
        (b"00010000000", "bytes go past the end"),  # 2 MiB
        (b"-0000000512", "no tar header"),
        (b"0000_000512", "no tar header"),
        (b"\x80\0\0\0\0\0\0\0\0\0\2", "no tar header"),  # base 256
        (b"\xff" * 12, "no tar header"),  # base 256, negative
        (b"99999999999", "no tar header"),
        (b"00000000100", "no tar header at byte 1024"),  # inside of a member
        (b"", "no tar header"),
    ],
)
def test_sizes_that_are_not(tmp_path: Path, text: bytes, message: str) -> None:
    refused(shard(tmp_path, resized(tar_of(*GOOD), text)), rf"shard-000000\.tar: .*{message}")


def test_members_that_are_too_large(tmp_path: Path) -> None:
    big = tar_of(("a.flac", bytes(5 << 20)), ("a.json", label()))
    refused(shard(tmp_path, big), r"member a\.flac: 5242880 bytes are too many")
    big = tar_of(("a.flac", FLAC), ("a.json", b" " * (2 << 20)))
    refused(shard(tmp_path, big), r"member a\.json: 2097152 bytes are too many")


def with_pax(headers: dict[str, str]) -> bytes:
    return tar_of(
        ("a.json", label()), plain("a.flac", pax_headers=headers), format=tarfile.PAX_FORMAT
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *(
            (with_pax({keyword: "1"}), f"PAX header .* sets {keyword}")
            for keyword in ("size", "linkpath", "GNU.sparse.map", "GNU.sparse.realsize")
        ),
        (tar_of(("x" * 300 + ".flac", FLAC), format=tarfile.PAX_FORMAT), "PAX header .* sets path"),
        (with_pax({"comment": "x" * (1 << 20)}), "bytes are too many"),
    ],
    ids=["size", "linkpath", "map", "realsize", "name", "bomb"],
)
def test_pax_headers_that_change_a_member_or_are_large(
    tmp_path: Path, data: bytes, message: str
) -> None:
    refused(shard(tmp_path, data), message)


def test_harmless_pax_headers_are_read_over(tmp_path: Path) -> None:
    """webdataset's writer, with its default time stamps, writes them."""
    data = tar_of(*GOOD, format=tarfile.PAX_FORMAT, mtime=1.5)
    assert b"PaxHeader" in data
    samples = ShardSamples(list_shards(shard(tmp_path, data)))
    assert (samples.read(0)[0] == tone_pcm(0)).all()


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_escapes(tmp_path: Path, seed: int) -> None:
    """Any change of bytes gives samples or a ``ValueError``: nothing else, nothing endless."""
    rng = np.random.default_rng(seed)
    data = bytearray(tar_of(*GOOD))
    headers = [0, 512 + -(-len(FLAC) // 512) * 512]
    for _ in range(int(rng.integers(1, 30))):
        place = int(rng.choice(headers)) + int(rng.integers(0, 700))
        data[place] = int(rng.integers(0, 256))
    folder = shard(tmp_path, bytes(data))
    try:
        pcm_T, mos = ShardSamples(list_shards(folder)).read(0)
        assert pcm_T.shape == (122_880,) and 1 <= mos <= 5
    except ValueError as error:
        assert "shard-000000.tar" in str(error)


# ---------------------------------------------------------------- audio


def changed_frames(frames: int, rate_hz: int = 16_000, channels: int = 1) -> bytes:
    """A FLAC whose header claims another number of samples, rate or channels."""
    packed = (rate_hz << 44) | ((channels - 1) << 41) | (15 << 36) | frames
    # STREAMINFO, behind its two block and two frame sizes
    return FLAC[:18] + packed.to_bytes(8, "big") + FLAC[26:]


def claiming_a_crop(samples: int) -> bytes:
    """So many samples under a header that says a crop's number."""
    data = flac_bytes(tone_pcm(0, samples))
    return data[:18] + FLAC[18:26] + data[26:]


def test_the_header_is_where_the_helper_changes_it() -> None:
    assert changed_frames(122_880) == FLAC
    info = soundfile.info(io.BytesIO(changed_frames(2**36 - 1, 8000, 8)))
    assert (info.frames, info.samplerate, info.channels) == (2**36 - 1, 8000, 8)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (changed_frames(2**36 - 1), r"shape \(68719476735,\)"),
        (changed_frames(0), "shape"),
        (changed_frames(122_880, channels=8), r"shape \(122880, 8\)"),
        (changed_frames(122_880, rate_hz=655_350), "655350 Hz"),
        (flac_bytes(np.zeros(30_000_000, np.int16)), r"shape \(30000000,\)"),
        (FLAC[: len(FLAC) // 2], r"a\.flac: (truncated|not readable)"),
        (claiming_a_crop(1000), r"a\.flac: (truncated|not readable)"),
        (FLAC[:100], r"a\.flac"),
        (flac_bytes(tone_pcm(0, 1000)), r"shape \(1000,\)"),
        (flac_bytes(tone_pcm(0), 8000), "8000 Hz"),
        (b"RIFFnot audio", "not readable as FLAC"),
        (b"fLaC", "not readable as FLAC"),
        (b"", "not readable as FLAC"),
    ],
    ids=[
        *("2^36", "none", "8 channels", "rate", "silence", "half", "claims more", "100 bytes"),
        *("short", "8 kHz", "RIFF", "magic", "empty"),
    ],
)
def test_audio_is_what_the_contract_says(tmp_path: Path, audio: bytes, message: str) -> None:
    refused(shard(tmp_path, tar_of(("a.flac", audio), ("a.json", label()))), message)


@pytest.mark.parametrize("kind", ["WAV", "OGG"])
def test_other_audio_under_that_name_is_refused(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone_pcm(0), 16_000, format=kind)
    data = tar_of(("a.flac", buffer.getvalue()), ("a.json", label()))
    refused(shard(tmp_path, data), f"not FLAC but {kind}")


def test_more_audio_than_its_header_says_is_not_decoded(tmp_path: Path) -> None:
    folder = shard(tmp_path, tar_of(("a.flac", claiming_a_crop(200_000)), GOOD[1]))
    pcm_T, _ = ShardSamples(list_shards(folder)).read(0)
    assert pcm_T.shape == (122_880,)


# ---------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"key": "a"}', "mos"),
        (label(mos=7), "mos"),
        (label(mos=float("nan")), "mos"),
        (label().replace(b"3.0", b"1e400"), "mos"),
        (label().replace(b"3.0", b"-Infinity"), "mos"),
        (label().replace(b"3.0", b"9" * 5000), "mos|JSON"),
        (label().replace(b'"logit": null', b'"logit": 1e400'), "logit"),
        (label(__reduce__="os.system"), "__reduce__"),
        (label(key="b"), "record of sample 'b'"),
        (label(plan=[]), "plan"),
        (b"[" * 500_000, "nested too deeply"),
        (b'{"plan":' * 100_000, "nested too deeply"),
        (label() + b"}", "JSON"),
        (b"\xff\xfe\0\0", "JSON"),
        (b"\x80\x04\x95", "JSON"),
        (b"null", "must be a JSON object"),
        (b"", "JSON"),
    ],
)
def test_records_are_what_the_contract_says(tmp_path: Path, data: bytes, message: str) -> None:
    folder = shard(tmp_path, tar_of(("a.flac", FLAC), ("a.json", data)))
    refused(folder, rf"shard-000000\.tar: a\.json: .*({message})")


def test_what_is_not_used_may_be_odd(tmp_path: Path) -> None:
    folder = shard(tmp_path, tar_of(("a.flac", FLAC), ("a.json", label(plan={"x": float("nan")}))))
    assert ShardSamples(list_shards(folder)).read(0)[1] == 3.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"samples": 10**15}, "not possible"),  # an order over so many would take the memory
        ({"samples": -1}, "samples"),
        ({"samples": True}, "samples"),
        ({"samples": "1"}, "samples"),
        ({"samples": 2}, "holds 1 samples, its record says 2"),
        ({"tar_bytes": True}, "tar_bytes"),
        ({"tar_bytes": 1e6}, "tar_bytes"),
        ({"tar_bytes": None}, "tar_bytes"),
    ],
)
def test_shard_records_are_held_to_the_tar(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    folder = shard(tmp_path, tar_of(*GOOD))
    path = folder / "shard-000000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    refused(folder, message)


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "{", "\0", "9" * 5000])
def test_other_files_that_are_not_json(tmp_path: Path, text: str) -> None:
    folder = shard(tmp_path, tar_of(*GOOD))
    (folder / "shard-000000.json").write_text(text)
    refused(folder, r"shard-000000\.json: (not JSON|must be a JSON object)")
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"dataset\.json: (not JSON|must be a JSON object)"):
        read_dataset_info(folder)


def test_a_description_that_is_too_long(tmp_path: Path) -> None:
    with (tmp_path / "dataset.json").open("wb") as file:
        os.truncate(file.fileno(), 1 << 33)
    with pytest.raises(ValueError, match=r"dataset\.json: longer than"):
        read_dataset_info(tmp_path)


def test_a_hash_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    system, tar = fsspec.filesystem("memory"), tar_of(*GOOD)
    about = {"tar_bytes": len(tar), "samples": 1, "tar_sha256": "../../x"}
    system.pipe_file("/hostile/shard-000000.tar", tar)
    system.pipe_file("/hostile/shard-000000.json", json.dumps(about).encode())
    with pytest.raises(ValueError, match=r"shard-000000\.json: 'tar_sha256' is no SHA-256"):
        list_shards("memory://hostile")
    about["tar_sha256"] = hashlib.sha256(tar).hexdigest()
    system.pipe_file("/hostile/shard-000000.json", json.dumps(about).encode())
    assert list_shards("memory://hostile")[0].tar.parent == tmp_path / "cache"
    system.rm("/hostile", recursive=True)


# ---------------------------------------------------------------- memory


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A sparse tar of 4 GB with a member that claims them, a PAX bomb, a huge FLAC header."""
    claims = resized(tar_of(*GOOD)[: 512 + len(FLAC)], b"37777777777")
    pax = resized(tar_of(plain("x", type=b"x")), b"37777777777")
    for number, data in enumerate((claims, pax)):
        folder = tmp_path / str(number)
        folder.mkdir()
        shard(folder, data)
        os.truncate(folder / "shard-000000.tar", 5 << 30)
        about = {"tar_bytes": 5 << 30, "samples": 1}
        (folder / "shard-000000.json").write_text(json.dumps(about))
    bomb = tmp_path / "2"
    bomb.mkdir()
    shard(bomb, tar_of(("a.flac", changed_frames(2**36 - 1)), ("a.json", label())))
    code = f"""
import resource
from pathlib import Path
from tests.memory import peak_bytes, peak_reset
from train.data.shards import list_shards
from train.data.stream import ShardSamples
before = peak_reset()
for folder in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        ShardSamples(list_shards(folder)).read(0)
        raise SystemExit("not refused")
    except ValueError as error:
        print(error)
print((peak_bytes() - before) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *errors, megabytes = done.stdout.splitlines()
    assert len(errors) == 3 and int(megabytes) < 64, done.stdout


def test_the_index_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (listed,) = list_shards(shard(tmp_path, tar_of(*GOOD)))
    sizes: list[int] = []
    read = os.pread

    def counted(descriptor: int, size: int, place: int) -> bytes:
        sizes.append(size)
        return read(descriptor, size, place)

    monkeypatch.setattr(os, "pread", counted)
    file = listed.open()
    assert len(index_of(file.number, "a tar")) == 1
    assert sizes == [512] * 3
