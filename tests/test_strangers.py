"""What comes from elsewhere writes and reads only where it belongs, runs nothing and is bounded."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from data_specs.io import names
from data_specs.io.errors import UserError
from data_specs.io.names import below, cell, inside, markdown, plain, visible
from data_specs.io.output import visible_output
from data_specs.io.storage import RemoteFolder
from data_specs.sample import SampleRecord
from data_specs.strict import Name
from data_specs.weight import Archive, Plain, all_weights
from pipeline.__main__ import main
from pipeline.dataset import shards
from pipeline.render.processors import lpcnet
from tests.conftest import ROOT, small_recipe
from tests.fake_dataset import write_dataset
from tests.servers import SECRETS, Guarded, answering, secrets_in, send, serving
from train.models import weights as places

OUTSIDE = [
    *("../x", "a/../../x", "..", "/etc/passwd", "..%2f..%2fx", "%2e%2e/x", "%252e%252e%252fx"),
    *("..\\x", "a\\..\\..\\x", "C:/x", "c:x", "a\0b", "", "a//b", "./a", "a/", "a/.", "x" * 300),
    "/".join(["d" * 200] * 8),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a path inside"):
        below(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.wav", "a b/ü.wav", "...", "..a/b", "100%.wav", "ab:c"])
def test_any_other_name_is_the_path_that_it_says(name: str, tmp_path: Path) -> None:
    assert below(tmp_path, name) == tmp_path / name


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_not(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for one in (folder / "in", other):
        one.mkdir(parents=True)
    (folder / "out").symlink_to(other)
    (folder / "file").symlink_to("/etc/hostname")
    (folder / "stays").symlink_to("in")
    for name in ("out/x", "out", "file"):
        with pytest.raises(UserError, match="link leads out"):
            below(folder, name)
    assert below(folder, "stays/x") == folder / "stays" / "x"


# --- weights at an address ------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, so that a copy of an address' cache is made below ``tmp_path``."""
    places._copy_here.cache_clear()
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in (lpcnet.PROGRAM.variable, lpcnet.PROGRAM.hash_variable):
        monkeypatch.delenv(name, raising=False)
    return folder


LINKS = ["../../evil", "..%2f..%2fevil", "%2e%2e%2f%2e%2e%2fevil", "..%5cevil", "a/../../../evil"]


@pytest.mark.parametrize("link", LINKS)
def test_an_index_page_that_leads_outside_writes_nothing(
    link: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(asked: BaseHTTPRequestHandler) -> None:
        if asked.path.endswith(("/demucs-dns48", "/demucs-dns48/")):
            send(asked, f'<a href="{link}">x</a>'.encode(), "text/html")
        else:
            send(asked, b"evil")

    with serving(answering(answer)) as host:
        monkeypatch.setenv("SPEECH_WEIGHTS", f"http://{host}/cache")
        assert main(["weights", "--list", "demucs-dns48"]) == 2
    assert "not a path inside" in capsys.readouterr().err
    assert not [path for path in home.parent.rglob("*") if path.is_file()]


def test_an_address_without_an_index_has_no_weights(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(answering(lambda asked: send(asked, b"no page"))) as host:
        monkeypatch.setenv("SPEECH_WEIGHTS", f"http://{host}/cache")
        assert main(["weights", "--list", "demucs-dns48"]) == 0
    assert "missing" in capsys.readouterr().out
    assert not [path for path in home.parent.rglob("*") if path.is_file()]


def test_keys_of_a_store_that_lead_outside_write_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://strangers")
    for key in ("../../evil", "..\\evil", "a/../../../evil"):
        places._copy_here.cache_clear()
        monkeypatch.setattr(RemoteFolder, "tree", lambda _, key=key: {key: (4, "")})
        with pytest.raises(UserError, match="lists what is no file"):
            places.cached("net")
    assert not [path for path in home.parent.rglob("*") if path.is_file()]


def test_a_link_in_the_cache_is_not_written_through(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://strangers-link")
    fsspec.filesystem("memory").pipe_file("/strangers-link/net/sub/x", b"evil")
    victim, folder = home.parent / "victim", places.cache_folder() / "net"
    victim.mkdir()
    folder.mkdir(parents=True)
    (folder / "sub").symlink_to(victim)
    with pytest.raises(UserError, match="link leads out"):
        places.cached("net")
    assert not list(victim.iterdir())


PROGRAM = b"#!/bin/sh\ntouch $HOME/ran\n"


def test_a_program_from_an_address_is_run_only_with_its_hash(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://strangers-program")
    monkeypatch.setenv("PATH", "/nowhere")
    fsspec.filesystem("memory").pipe_file("/strangers-program/lpcnet/lpcnet_demo", PROGRAM)
    with pytest.raises(PermissionError, match=lpcnet.PROGRAM.hash_variable):
        lpcnet.PROGRAM.path()
    path = places.cached("lpcnet") / "lpcnet_demo"
    assert path.stat().st_mode & 0o111 == 0
    monkeypatch.setenv(lpcnet.PROGRAM.hash_variable, "0" * 64)
    with pytest.raises(PermissionError, match="is not run"):
        lpcnet.PROGRAM.path()
    assert path.stat().st_mode & 0o111 == 0
    monkeypatch.setenv(lpcnet.PROGRAM.hash_variable, hashlib.sha256(PROGRAM).hexdigest())
    assert lpcnet.PROGRAM.path() == path and os.access(path, os.X_OK)


def test_hashes_beside_the_files_at_an_address_are_no_trust(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://strangers-sums")
    store, other = fsspec.filesystem("memory"), b"another network"
    name = places.entry_of("demucs-dns64").files[0].name
    sums = f"# {len(other)} bytes: {name}\n{hashlib.sha256(other).hexdigest()}  {name}\n"
    store.pipe_file(f"/strangers-sums/demucs-dns64/{name}", other)
    store.pipe_file("/strangers-sums/demucs-dns64/SHA256SUMS", sums.encode())
    with pytest.raises(UserError, match="SHA-256 is not the table's"):
        places.find("demucs-dns64")
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_no_redirection_from_https_to_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a certificate made for it: the redirection itself is followed by aiohttp."""
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key", "-out", "certificate"]
    try:
        subprocess.run(["openssl", *made], cwd=tmp_path, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")

    def away(one: BaseHTTPRequestHandler) -> None:
        one.send_response(302)
        one.send_header("Location", f"http://{plain_http}{one.path}")
        one.send_header("Content-Length", "0")
        one.end_headers()

    asked: list[str] = []

    def answer(one: BaseHTTPRequestHandler) -> None:
        asked.append(one.path)
        send(one, b"evil")

    code = (
        "import sys\nfrom data_specs.io.storage import RemoteFolder\n"
        "try:\n    print(RemoteFolder(sys.argv[1]).read(['x'], 9))\n"
        "except OSError as error:\n    print(error)\n"
    )
    with serving(answering(answer)) as plain_http, serving(answering(away), context) as host:
        run = subprocess.run(
            [sys.executable, "-c", code, f"https://{host}"],
            env={**os.environ, "SSL_CERT_FILE": str(tmp_path / "certificate")},
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )
    assert "redirects from https to http" in run.stdout and not asked, run.stdout + run.stderr


# --- servers that send more than was asked for ----------------------------------------------------


def limited(code: str, *arguments: str, memory_mb: int = 600) -> subprocess.CompletedProcess[str]:
    """Run Python with a limit on what it may take of memory beyond its imports."""
    whole = (
        "import resource, sys\nimport numpy, soundfile, aiohttp, fsspec\n"
        "import data_specs.io.storage, pipeline.dataset.shards, pipeline.audio, train.data.tars\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"most = used + ({memory_mb} << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n" + code
    )
    return subprocess.run(
        [sys.executable, "-c", whole, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def without_end(asked: BaseHTTPRequestHandler) -> None:
    """200 and zeros for ever, whatever range was asked for; an index page that never ends."""
    asked.send_response(200)
    asked.send_header("Content-Type", "text/html")
    asked.send_header("Content-Length", str(10**10))
    asked.end_headers()
    try:
        while asked.command == "GET":
            asked.wfile.write(bytes(1 << 20))
    except OSError:
        return


READ = """
from data_specs.io.storage import RemoteFolder
folder = RemoteFolder(sys.argv[1])
try:
    folder.read(["x"], 1 << 16)
except ValueError as error:
    assert "longer than 65536" in str(error), error
assert folder.part("x", 10, 30) == bytes(20)
try:
    folder.sizes()
except OSError as error:
    assert "longer than" in str(error), error
print("bounded")
"""


def test_a_server_that_ignores_ranges_is_not_read_to_its_end() -> None:
    with serving(answering(without_end)) as host:
        run = limited(READ, f"http://{host}")
    assert run.stdout == "bounded\n", run.stdout + run.stderr


# --- tars, records and FLACs that claim more than they hold ---------------------------------------

BOMBS = """
import io, pathlib, tarfile
from data_specs.io.errors import UserError
from pipeline.audio import decode_flac
from pipeline.dataset.shards import samples

folder = pathlib.Path(sys.argv[1])


def sparse_file(name, header):
    with open(folder / name, "wb") as file:  # 64 GB of zeros that take no room on the disk
        file.write(header)
        file.truncate(64 << 30)
    return folder / name


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse_member():
    info = tarfile.TarInfo("000000000.flac")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"00000000000\\0", b"00000001000\\0"
    block[483:495] = (64 << 30).to_bytes(12, "big")
    block[483] |= 0x80
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\\0 " % sum(block)
    path = folder / "sparse.tar"
    path.write_bytes(bytes(block) + bytes(512) + bytes(1024))
    return path


def packed(ending):
    path = folder / f"packed.{ending}.tar"
    with tarfile.open(path, f"w:{ending}") as tar:
        info = tarfile.TarInfo("000000000.flac")
        info.size = 1 << 30
        class Zeros(io.RawIOBase):
            def readable(self): return True
            def readinto(self, b): b[:] = bytes(len(b)); return len(b)
        tar.addfile(info, io.BufferedReader(Zeros()))
    return path


for tar in (
    sparse_file("plain.tar", header("000000000.flac", 6 << 30)),
    sparse_file("record.tar", header("000000000.json", 6 << 30)),
    sparse_file("pax.tar", header("x", 6 << 30, tarfile.XHDTYPE)),
    sparse_file("long.tar", header("x", 6 << 30, tarfile.GNUTYPE_LONGNAME)),
    sparse_member(),
    packed("bz2"),
    packed("gz"),
):
    try:
        list(samples(tar))
    except UserError as error:
        assert str(tar) in str(error), error
    else:
        raise AssertionError(tar)

import numpy, soundfile
buffer = io.BytesIO()
with soundfile.SoundFile(buffer, "w", 16000, 1, format="FLAC", subtype="PCM_16") as file:
    for _ in range(2 * 3600):  # 2 h: 230 MB as int16
        file.write(numpy.zeros(16000, numpy.int16))
claims = bytearray(buffer.getvalue())
claims[21:26] = bytes([claims[21] & 0xF0 | 0xF]) + b"\\xff" * 4  # 1190 h
unknown = bytearray(buffer.getvalue())
unknown[21:26] = bytes([unknown[21] & 0xF0]) + bytes(4)
for data in (buffer.getvalue(), bytes(claims), bytes(unknown)):
    try:
        decode_flac(data)
    except UserError as error:
        assert "must be 122880" in str(error), error
    else:
        raise AssertionError("decoded")
print("bounded")
"""


@pytest.mark.slow
def test_tars_and_flacs_that_claim_more_are_refused_in_little_memory(tmp_path: Path) -> None:
    run = limited(BOMBS, str(tmp_path), memory_mb=150)
    assert run.stdout == "bounded\n", run.stdout + run.stderr


@pytest.mark.parametrize(
    "change",
    [
        *({"samples": 1e9}, {"planned": 10**12}, {"shard": 10**9}, {"tar_bytes": -1}),
        *({"summary": {"mos": [1]}}, {"summary": {"mos": [0] * 41}}),
    ],
)
def test_a_shards_record_says_no_more_than_a_shard_can_hold(change: dict[str, Any]) -> None:
    record = {
        **{"shard": 0, "dataset_hash": "x", "samples": 1, "planned": 1, "tar_bytes": 1},
        **{"tar_sha256": "x", "pcm_sha256": "x", "dropped": [], "versions": {}},
    }
    shards.parse_record(json.dumps(record).encode(), "here")
    with pytest.raises(shards.ShardError) as refused:
        shards.parse_record(json.dumps(record | change).encode(), "here")
    assert str(refused.value).startswith("here: ") and next(iter(change)) in str(refused.value)


# --- names of specs -------------------------------------------------------------------------------

NO_NAMES = [
    "../../victim/data",
    "a/b",
    "..",
    ".hidden",
    "a b",
    "a\nb",
    "a\n",
    "a;b",
    "",
    "ü",
    "x" * 81,
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_in_specs_have_an_alphabet(name: str) -> None:
    from data_specs.corpus import CorpusFile
    from data_specs.recipe import Source

    with pytest.raises(ValidationError):
        TypeAdapter(Name).validate_python(name)
    with pytest.raises(ValidationError):
        Source(corpus=name)
    part = {"licence": "x"}
    with pytest.raises(ValidationError):
        CorpusFile.model_validate({"corpora": {name: {"kind": "speech", "parts": [part]}}})
    assert TypeAdapter(Name).validate_python("dns4_speech-2.0") == "dns4_speech-2.0"


@pytest.mark.parametrize("verb", ["merge", "relabel", "extend", "card", "verify", "replay"])
def test_a_corpus_whose_name_is_a_path_writes_nothing_outside(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole dataset of a stranger, its hash and all, but for the name of its corpus."""
    victim = tmp_path / "victim" / "data.parquet"
    victim.parent.mkdir()
    victim.write_bytes(b"mine")
    dataset, out = tmp_path / "in" / "dataset", tmp_path / "in" / "out"
    write_dataset(dataset)
    about = json.loads((dataset / "dataset.json").read_bytes())
    about["recipe"]["sources"]["speech"]["corpus"] = "../../../victim/data"
    about |= {"samples": 10, "identity": {"recipe": about["recipe"], "corpora": {}, "splits": {}}}
    (dataset / "dataset.json").write_text(json.dumps(about))
    more = {
        "merge": [str(dataset), "--out", str(out)],
        "relabel": [str(dataset), "--teacher", "distillmos", "--out", str(out)],
        "extend": [str(dataset), "--samples", "20", "--out", str(out)],
        "replay": ["000000000", "--dataset", str(dataset)],
    }
    assert main([verb, *more.get(verb, [str(dataset)])]) == 2
    told = capsys.readouterr().err
    assert "dataset.json: recipe" in told and "sources.speech.corpus" in told
    assert victim.read_bytes() == b"mine" and not list(victim.parent.glob(".*"))


# --- what is printed, and what programs open ------------------------------------------------------

NASTY = "a\x1b[2J\x1b]0;x\x07\r\x9b1m\u202egnp.\x7f\udcff\u2066"


def test_nothing_that_is_printed_moves_a_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shards", NASTY])
    assert main(["verify", f"/nowhere/{NASTY}"]) == 2
    assert main(["preview", f"/nowhere/{NASTY}\nerror: none"]) == 2
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert not names.UNSEEN.search(text.replace("\n", ""))
    assert r"a\x1b[2J\x1b]0;x\x07\x0d\x9b1m\u202egnp.\x7f\xff\u2066" in told.err


def test_a_name_that_no_encoding_has_is_printed_in_ascii() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pipeline", "verify", "/nowhere/ü\u202e"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=120,
    )
    assert run.returncode == 2 and rb"/nowhere/\xfc\u202e" in run.stderr, run.stderr


CELLS = [
    *("=cmd|' /C calc'!A0", "+1+1", "-2+3+cmd", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "\n=1"),
    *("\uff1d1+1", "-", "=", "'", "''", "it's", "", "a=1", "-x.wav"),
]


def test_cells_run_nothing_and_are_read_back() -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[cell(one)] for one in CELLS])
    text.seek(0)
    written = [row[0] if row else "" for row in csv.reader(text)]
    assert not [one for one in written if one[:1] in tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")]
    assert [plain(one) for one in written] == CELLS
    numbers = ["-1.5", "+3", "-1e-9", -1.5, -3, None, "-inf", "1"]
    assert [cell(one) for one in numbers] == numbers


EVIL = (
    "<script>alert(1)</script> [x](javascript:alert(1)) ![](http://e/x) | `x` **b** \n# h\n---\n- y"
)


def test_markdown_is_read_as_text() -> None:
    made = markdown(EVIL)
    assert "\n" not in made and "<" not in made and "](" not in made.replace("\\](", "")
    assert made.startswith("&lt;script&gt;") and made.count("\\|") == 1 and "\\`x\\`" in made
    assert markdown("CC-BY-4.0") == "CC-BY-4.0" and markdown("# h") == "\\# h"
    assert visible(EVIL).count("\\x0a") == 3


@pytest.mark.parametrize("name", ["../x", "a\\b", "a%2fb"])
def test_a_path_of_a_plan_stays_in_its_corpus(name: str, tmp_path: Path) -> None:
    from pipeline.render.plan import FilePlan
    from pipeline.render.render import find

    with pytest.raises(UserError, match="not a path inside"):
        find({"speech": [tmp_path]}, FilePlan(corpus="speech", root=0, path=name))
    with pytest.raises(OSError, match="was not given"):
        find({"speech": [tmp_path]}, FilePlan.model_construct(corpus="speech", root=-1, path="x"))
    assert inside("a/b") == "a/b"


def test_a_datasets_card_is_text_whatever_its_records_say(tmp_path: Path) -> None:
    from pipeline.dataset.attempts import Tally
    from pipeline.dataset.card import card
    from pipeline.dataset.job import Job

    evil = "```\n<script>x</script>\n---\nlicense: mit\n| a | [x](javascript:y) |"
    made = small_recipe().model_copy(update={"about": evil})
    identity = {
        **{"teacher_sha256": evil, "splits": {"speech": "train", evil: evil}},
        **{"versions": {evil: evil}, "derived_from": None},
    }
    job = Job(made, identity, 10, tmp_path, {})
    tally = Tally(whole={0: 10}, mos=[1] * 40, mos_sum=10.0)
    for counts in (tally.dropped, tally.licences, tally.corpora, tally.languages, tally.processors):
        counts[evil] = 3
    text = card(job, tally)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license_name"].startswith("several")
    body = re.sub(r"\n(`{3,})\w*\n.*?\n\1\n", "\n", body, flags=re.DOTALL)  # fenced: code
    assert "<script>" not in body and "](javascript" not in body.replace("\\](", "")
    assert not re.search(r"^(---|license:)", body, re.MULTILINE)
    assert "<script>" not in text


def test_our_tables_read_back_what_they_were_given(tmp_path: Path) -> None:
    from data_specs.rated import read_rated
    from train.files import csv_rows, csv_text

    rows = [{"path": one, "mos": 2.5} for one in CELLS if "\r" not in one and "\n" not in one]
    path = tmp_path / "scores.csv"
    path.write_text(csv_text(rows))
    assert [row["path"] for row in csv_rows(path)] == [row["path"] for row in rows]
    (tmp_path / "=1.wav").write_bytes(b"")
    path.write_text(csv_text([{"path": "=1.wav", "mos": 2.5}]))
    assert "'=1.wav" in path.read_text() and read_rated(path)[0].path.name == "=1.wav"


def test_a_table_of_scores_goes_on_with_names_that_a_spreadsheet_would_run(tmp_path: Path) -> None:
    from train.scoring.table import COLUMNS, LineTable

    row = dict.fromkeys(COLUMNS) | {"path": "=1+1.wav", "rows": 1}
    table = LineTable(tmp_path / "scores.csv")
    text = [name for name, kind in COLUMNS.items() if kind is COLUMNS["path"]]
    row |= {name: "=x" for name in text if name != "path"}
    table.append([row])
    table.close()
    assert "\n'=1+1.wav" in (tmp_path / "scores.csv").read_text()
    assert "=1+1.wav" in {path for path, _ in LineTable(tmp_path / "scores.csv").outcomes}


# --- credentials in addresses ---------------------------------------------------------------------


@pytest.fixture
def guarded(corpora: dict[str, list[Path]], tmp_path: Path) -> Iterator[str]:
    """Host and port of a server of the corpora and, under ``made``, of what is made here."""
    (tmp_path / "site").mkdir()
    for name, (folder,) in corpora.items():
        (tmp_path / "site" / name).symlink_to(folder)
    (tmp_path / "site" / "made").symlink_to(tmp_path / "made")
    handler = functools.partial(Guarded, directory=str(tmp_path / "site"))
    with serving(handler) as host:
        yield host


@pytest.mark.slow  # it makes two datasets and labels one again
def test_no_credential_of_an_address_lands_anywhere(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("data_specs.io.retry.WAITS_S", ())
    recipe = small_recipe(shard_samples=2, group_samples=2, max_dropped_share=1.0)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    login, signed = f"http://me1:PASSWORD1@{guarded}", f"http://{guarded}/made/one?sig=SIGNATURE1"
    roots = [f"--corpus={name}={login}/{name}" for name in ("speech", "noise", "rooms")]
    made, local = tmp_path / "made", ["--engine", "local", "--workers", "1"]
    one = str(made / "one")
    assert main(["shards", str(file), *roots, "--samples", "4", "--out", one, *local]) == 0
    assert main(["extend", one, *roots, "--samples", "6", *local]) == 0
    assert main(["preview", one, *roots, "--count", "2", "--out", str(made / "page.html")]) == 0
    assert main(["replay", "000000001", "--dataset", signed, *roots, "--out", str(made / "r")]) == 0
    assert main(["merge", signed, "--out", str(made / "merged")]) == 0
    again = ["--teacher", "distillmos", "--out", str(made / "again"), *local]
    assert main(["relabel", signed, *again]) == 0
    for verb in (["verify", signed, "--deep"], ["status", signed]):
        assert main(verb) == 0
    wrong = f"http://me1:PASSWORD1@{guarded}/nowhere?sig=no&TOKEN1"
    bad = [f"--corpus=speech={wrong}", *roots[1:], "--out", str(made / "bad"), "--samples", "2"]
    refused = (
        ["shards", str(file), *bad],
        ["shards", str(file), f"--corpus={wrong}", "--samples", "2", "--out", str(made / "bad")],
        ["shards", str(file), f"--colour={wrong}", "--samples", "2", "--out", str(made / "bad")],
        ["card", signed],
        ["merge", wrong, "--out", str(made / "bad")],
        ["relabel", wrong, *again],
        ["status", wrong],
        ["shards", str(file), *roots, "--samples", "2", "--out", wrong, *local],
        ["weights", "--list", "lpcnet"],
    )
    monkeypatch.setenv("SPEECH_WEIGHTS", wrong)
    for verb in refused:
        with suppress(SystemExit):
            assert main(verb) != 0 or verb[0] == "weights", verb
    told = capfd.readouterr()
    assert not [secret for secret in SECRETS if secret in told.out + told.err], told.out + told.err
    assert not secrets_in(tmp_path)


def test_no_credential_is_printed_whoever_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    address = "http://me1:PASSWORD1@host/x?sig=SIGNATURE1"
    with visible_output():
        print(f"a bug of ours: {address!r} and s3://bucket/x, https://host/y.")
        print(f"({address})", file=sys.stderr)
    told = capsys.readouterr()
    assert told.out == "a bug of ours: 'http://host/x' and s3://bucket/x, https://host/y.\n"
    assert "http://host/x" in told.err
    assert not [secret for secret in SECRETS if secret in told.out + told.err]


SITE = """
project: /project
slurm: {cores: 4, memory_gb: 32, logs: /logs}
"""


@pytest.mark.parametrize("word", ["--corpus=speech=", "--out=", "--other-option="])
def test_no_credential_of_an_address_lands_in_a_job(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.yaml").write_text(SITE)
    job = ["demo", "--corpus=speech=/a", "--corpus=noise=/b", "--corpus=rooms=/c", "--samples=2"]
    job += ["--out=/out", f"{word}http://me1:PASSWORD1@host/x?sig=SIGNATURE1"]
    verb = ["submit", "slurm", "--site", str(tmp_path / "site.yaml"), "--dry-run", "--", *job]
    with suppress(SystemExit):
        assert main(verb) == 2
    told = capsys.readouterr()
    assert not [secret for secret in SECRETS if secret in told.out + told.err]
    site = f"{SITE}environment: {{CORPUS_SPEECH: 'http://me1:PASSWORD1@host'}}\n"
    (tmp_path / "site.yaml").write_text(site)
    assert main(verb) == 2
    told = capsys.readouterr()
    assert "environment" in told.err and "PASSWORD1" not in told.out + told.err


# --- the Makefile ---------------------------------------------------------------------------------

AWKWARD = 'it\'s a "folder" & $(touch evil); `touch evil`'


def told(target: str, folder: Path, **variables: object) -> list[list[str]]:
    """The commands of a target, as lists of words, with a stand-in for Python."""
    stand_in = folder / "print"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n", "utf-8"
    )
    stand_in.chmod(0o755)
    given = [f"{name}={str(value).replace('$', '$$')}" for name, value in variables.items()]
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), "-o", "setup", target, *given]
    run = subprocess.run(
        [*command, f"PY={stand_in}", "WORKERS=1"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        env={name: v for name, v in os.environ.items() if not name.startswith("MAKE")},
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]


def behind(words: list[str], flag: str) -> list[str]:
    return [value for one, value in pairwise(words) if one == flag]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_takes_a_path_for_one_word_whatever_is_in_it(tmp_path: Path) -> None:
    out, rated, two = tmp_path / AWKWARD, tmp_path / "rated clips", [tmp_path / n for n in "ab"]
    for folder in (out / "shards", rated, *two):
        folder.mkdir(parents=True)
    for name in ("a b.csv", "c.csv"):
        (rated / name).touch()
    (words,) = told("evaluate", tmp_path, OUT=out, RATED=rated, CLEAN=out / "x.wav")
    assert behind(words, "--rated") == [str(rated / "a b.csv"), str(rated / "c.csv")]
    assert behind(words, "--out") == [f"{out}/evaluation"]
    assert behind(words, "--shards") == [f"{out}/shards/test"]
    assert behind(words, "--clean-speech") == [f"{out}/x.wav"]
    (words,) = told("shards", tmp_path, OUT=out, SPEECH=out, NOISE=f"{two[0]} {two[1]}", RECIPE=out)
    assert behind(words, "--out") == [f"{out}/shards/train"]
    assert behind(words, "--and") == [f"{s}=150:{out}/shards/{s}" for s in ("validation", "test")]
    corpora = [f"speech={out}", *(f"noise={one}" for one in two), f"rooms={out}/corpora/rooms"]
    assert behind(words, "--corpus") == corpora and str(out) in words
    for target, flag, variable in (
        ("train", "--out", "OUT"),
        ("report", "--out", "OUT"),
        ("preview", "--out", "OUT"),
        ("export", "--out", "EXPORT_OUT"),
        ("prune", "--out", "PRUNE_OUT"),
        ("teacher", "--out", "TEACHER_OUT"),
        ("relabel", "--out", "RELABELLED"),
        ("submit-train", "--site", "SITE"),
    ):
        more = {"RATED": rated, "SHARDS": out, "MODEL": out, variable: out}
        (words,) = told(target, tmp_path, **more)
        assert behind(words, flag)[0].startswith(str(out)), target
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("ref", ["", "master", "v1.0", "0123abc", "0" * 39, f"{'0' * 40};id"])
def test_make_lpcnet_builds_no_branch(ref: str, tmp_path: Path) -> None:
    command = ["make", "-f", str(ROOT / "Makefile"), "lpcnet", f"LPCNET_REF={ref}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert run.returncode and "LPCNET_REF=<40 hex digits>" in run.stdout + run.stderr


# --- files that records and tables name -----------------------------------------------------------


def plan_of(path: str) -> Any:
    from pipeline.render.plan import SamplePlan

    speech = {"corpus": "speech", "root": 0, "path": path, "start_sample": 0}
    return SamplePlan.model_validate(
        {
            **{"index": 0, "speech": {**speech, "speaker": "x", "language": ""}, "speed": 1},
            **{"level_dbfs": -20, "room": None, "noise": None, "speech_steps": 0, "steps": ()},
        }
    )


@pytest.mark.parametrize("path", ["../secret.wav", "link.wav", "folder/secret.wav", "/secret.wav"])
def test_a_record_puts_no_file_from_outside_the_corpus_into_a_page(
    path: str, tmp_path: Path
) -> None:
    from pipeline.dataset import preview
    from tests.conftest import talk, write

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write(tmp_path / "secret.wav", talk(8, 0))
    (corpus / "link.wav").symlink_to("../secret.wav")
    (corpus / "folder").symlink_to("..")
    plan = plan_of(path.replace("/secret", f"{tmp_path}/secret") if path[0] == "/" else path)
    record = SampleRecord.model_validate(
        {
            **{"key": "000000000", "mos": 3, "logit": None, "teacher": "x", "teacher_sha256": "x"},
            **{"pcm_sha256": "x", "plan": plan.model_dump(mode="json")},
        }
    )
    with pytest.raises(UserError, match=r"not a path inside|--allow-outside"):
        preview._original(record, {"speech": [corpus]})
    if "link" in path or "folder" in path:  # a link of one's own, with the word for it
        assert preview._original(record, {"speech": [corpus]}, outside=True)["audio"]


@pytest.mark.parametrize(
    "change", [{"speed": 1e-9}, {"index": -1}, {"steps": [{}] * 101}, {"speech_steps": -1}]
)
def test_a_plan_of_a_record_is_held_to_what_is_drawn(change: dict[str, Any]) -> None:
    from pipeline.render.plan import SamplePlan

    with pytest.raises(ValidationError, match=next(iter(change))):
        SamplePlan.model_validate(plan_of("x.wav").model_dump(mode="json") | change)


def test_the_page_of_a_comparison_holds_no_audio_from_outside_its_tables(tmp_path: Path) -> None:
    from tests.conftest import talk, write
    from train.evaluation.evaluate import read_sets

    folder = tmp_path / "rated"
    folder.mkdir()
    for path in (folder / "in.wav", tmp_path / "out.wav"):
        write(path, talk(1, 0))
    (folder / "link.wav").symlink_to("../out.wav")
    lines = ["path,mos", "in.wav,3", "../out.wav,3", f"{tmp_path}/out.wav,3", "link.wav,3"]
    for number, line in enumerate(lines[1:]):
        (folder / f"{number}.csv").write_text(f"path,mos\n{line}\n")
    sets = read_sets([folder / f"{number}.csv" for number in range(4)], [])
    assert [clip.path.name for clip in sets.below] == ["in.wav"] and len(sets.clips) == 4


def test_every_file_that_is_fetched_is_pinned() -> None:
    """By a hash, or by a commit of the hub; nobody publishes one of Coqui's vocoder."""
    loose = {
        name
        for name, entry in all_weights().items()
        for file in entry.files
        if isinstance(entry, Plain | Archive)
        and not file.published
        and not (isinstance(entry, Archive) and entry.archive.published)
    }
    assert loose == {"hifigan-coqui"}
