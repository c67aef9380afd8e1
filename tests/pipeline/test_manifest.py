"""Manifests are read back: nothing is scanned twice, and what was changed or damaged is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_specs.corpus import find_corpus
from data_specs.io.files import only_writer
from data_specs.io.storage import LocalFolder
from data_specs.recipe import Recipe
from pipeline import audio
from pipeline.corpora import manifest as manifests
from pipeline.corpora.manifest import SCHEMA, CorpusError, Manifest, scan
from pipeline.dataset import job as jobs
from pipeline.dataset import prepare
from pipeline.engine import extend
from tests.conftest import one_corpus_recipe, small_recipe, talk, write
from tests.pipeline.conftest import Says
from tests.pipeline.test_extend import asked
from tests.sketches import make_all

Opened = list[str]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Names of the files whose headers were read. No teacher is loaded."""
    found: Opened = []
    read = manifests._header

    def counted(root: Any, path: str) -> audio.Header:
        found.append(path)
        return read(root, path)

    class Teacher:
        weights_sha256 = "a" * 64

    monkeypatch.setattr(manifests, "_header", counted)
    monkeypatch.setattr(prepare.label, "load", lambda spec: Teacher())
    monkeypatch.setattr(prepare.label, "calibration", lambda teacher: None)
    yield found


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Three speakers, and a file that is no audio."""
    for i in range(3):
        write(tmp_path / "speech" / "en" / f"talker{i}" / "0.wav", talk(1, i))
    (tmp_path / "speech" / "en" / "broken.wav").write_bytes(b"RIFFnothing")
    return tmp_path / "speech"


@pytest.fixture
def recipe() -> Recipe:
    plain: dict[str, Any] = {"speech_stages": [], "stages": [], "room": None, "noise": None}
    sources = {"speech": {"corpus": "speech", "holdout": {"validation": 0.2, "test": 0.2}}}
    return small_recipe(**plain, sources=sources, shard_samples=4, group_samples=2)


def prepared(recipe: Recipe, speech: Path, out: Path, samples: int = 4) -> jobs.Job:
    return prepare.prepare(recipe, {"speech": [speech]}, out, samples)


# --- nothing is scanned twice ---------------------------------------------------------------------


def test_a_start_on_an_unchanged_corpus_opens_no_header(
    recipe: Recipe, speech: Path, tmp_path: Path, opened: Opened
) -> None:
    first = prepared(recipe, speech, tmp_path / "out")
    assert len(opened) == 4
    stored = tmp_path / "out" / "manifests" / "speech.parquet"
    inode = stored.stat().st_ino
    opened.clear()
    again = prepared(recipe, speech, tmp_path / "out")
    assert opened == []
    assert again.identity == first.identity
    assert again.manifests["speech"].table.equals(first.manifests["speech"].table)
    assert stored.stat().st_ino == inode  # nor written again, under another task's eyes


def test_extend_scans_once_and_only_what_is_new(
    recipe: Recipe, speech: Path, tmp_path: Path, opened: Opened
) -> None:
    make_all(prepared(recipe, speech, tmp_path / "one"))
    opened.clear()
    given = [f"speech={speech}"]
    options = asked(8)
    options.corpus = given
    make_all(extend.extended(tmp_path / "one", options))
    assert opened == []
    write(tmp_path / "more" / "en" / "newcomer" / "0.wav", talk(1, 9))
    options = asked(12, tmp_path / "two")
    options.corpus = [*given, f"speech={tmp_path / 'more'}"]
    make_all(extend.extended(tmp_path / "one", options))
    assert opened == ["en/newcomer/0.wav"]


def another_length(path: Path) -> None:
    write(path, talk(2, 7))


def same_size_at_another_time(path: Path) -> None:
    """16 kHz becomes 8: the same number of bytes, twice as long."""
    old = path.stat()
    data = bytearray(path.read_bytes())
    data[24:28] = (8_000).to_bytes(4, "little")
    path.write_bytes(data)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert path.stat().st_size == old.st_size


def another_name(path: Path) -> None:
    path.rename(path.with_name("1.wav"))


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [another_length, same_size_at_another_time, another_name, gone])
def test_a_changed_corpus_gives_what_a_scan_gives(
    change: Callable[[Path], None], speech: Path, opened: Opened
) -> None:
    corpus = find_corpus("speech", "test")
    known = scan("speech", corpus, [speech])
    change(speech / "en" / "talker1" / "0.wav")
    opened.clear()
    quick = scan("speech", corpus, [speech], known=known)
    assert len(opened) == (0 if change is gone else 1)
    assert quick.table.equals(scan("speech", corpus, [speech]).table)
    assert quick.sha256 != known.sha256


def test_other_rules_make_a_manifest_anew(speech: Path, opened: Opened) -> None:
    corpus = find_corpus("speech", "test")
    known = scan("speech", corpus, [speech])
    longer = corpus.model_copy(update={"min_seconds": 1.5})
    with pytest.raises(CorpusError, match="too short"):
        scan("speech", longer, [speech], known=known)
    assert len(opened) == 8


def test_at_an_address_a_listing_tells_what_changed(speech: Path, opened: Opened) -> None:
    system, corpus = fsspec.filesystem("memory"), find_corpus("speech", "test")
    for path in speech.rglob("*.wav"):
        system.pipe_file(f"/kept/{path.relative_to(speech)}", path.read_bytes())
    known = scan("speech", corpus, ["memory://kept"])
    opened.clear()
    assert scan("speech", corpus, ["memory://kept"], known=known) is known
    assert opened == []
    system.pipe_file("/kept/en/talker1/0.wav", (speech / "en/talker2/0.wav").read_bytes() + b"0")
    scan("speech", corpus, ["memory://kept"], known=known)
    assert opened == ["en/talker1/0.wav"]


def test_a_folder_of_manifests_has_one_writer(speech: Path, tmp_path: Path, says: Says) -> None:
    command = ["manifest", one_corpus_recipe(tmp_path), "--corpus", f"speech={speech}", "--out"]
    with only_writer(tmp_path / "out"):
        assert "another command writes to it" in says(2, *command, tmp_path / "out")


# --- what is read back is what was written --------------------------------------------------------


def saved(manifest: Manifest, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest.save(folder / "speech.parquet")
    return folder / "speech.parquet"


def load(path: Path) -> Manifest:
    return Manifest.load("speech", LocalFolder(path.parent), path.name)


def large(rows: int) -> pa.Table:
    row = {"channels": 1, "size_bytes": 9, "speaker": "a", "language": "", "licence": "CC0"}
    more = {"root": 0, "frames": 9, "sample_rate_hz": 16_000, "rejected": "", "stamp": "1"}
    found = [row | more | {"path": f"{i:08d}.wav"} for i in range(rows)]
    return pa.Table.from_pylist(found, schema=SCHEMA)


def test_a_manifest_read_back_is_the_one_that_was_written(speech: Path, tmp_path: Path) -> None:
    found = scan("speech", find_corpus("speech", "test"), [speech])
    back = load(saved(found, tmp_path / "manifests"))
    assert back.table.equals(found.table, check_metadata=True)
    assert back.sha256 == found.sha256
    assert scan("speech", find_corpus("speech", "test"), [speech], known=back) is back


def test_the_hash_does_not_depend_on_how_a_table_is_cut() -> None:
    table = large(25_000)
    cut = pa.concat_tables([table.slice(0, 7), table.slice(7, 12_345), table.slice(12_352)])
    assert Manifest("speech", cut).sha256 == Manifest("speech", table).sha256


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a path above": ({"path": "en/../../x.wav"}, "a path that leaves its folder"),
    "an absolute path": ({"path": "/etc/passwd"}, "a path that leaves its folder"),
    "a negative length": ({"frames": -1}, "a negative number"),
    "no length": ({"frames": 0}, "a file without audio"),
    "no rate": ({"sample_rate_hz": 0}, "a file without audio"),
    "nobody": ({"speaker": None}, "an empty field"),
    "twice": ({"path": "00000001.wav"}, "a file twice"),
}


@pytest.mark.parametrize("what", WRONG)
def test_rows_that_no_scan_gives_are_refused(what: str, tmp_path: Path) -> None:
    change, said = WRONG[what]
    rows = large(3).to_pylist()
    rows[0] |= change
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "speech.parquet")
    with pytest.raises(CorpusError, match=rf"{tmp_path}/speech\.parquet: not a manifest.*{said}"):
        load(tmp_path / "speech.parquet")


def test_a_manifest_that_is_huge_once_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 50_000
    columns = {name: large(1)[name].to_pylist() * rows for name in SCHEMA.names}
    pages = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["a" * 100_000])
    table = pa.table(columns, schema=SCHEMA).set_column(6, "speaker", pages)  # 5 GB of "a"
    pq.write_table(table, tmp_path / "speech.parquet")
    assert (tmp_path / "speech.parquet").stat().st_size < 1_000_000
    with pytest.raises(CorpusError, match="column 'speaker' is too long"):
        load(tmp_path / "speech.parquet")
    monkeypatch.setattr(manifests, "MOST_FILES", 49_999)
    with pytest.raises(CorpusError, match="50000 rows are too many"):
        load(tmp_path / "speech.parquet")
    monkeypatch.setattr(manifests, "MOST_BYTES", 100)
    with pytest.raises(CorpusError, match="bytes are too many"):
        load(tmp_path / "speech.parquet")


def test_no_changed_byte_of_a_manifest_goes_unnoticed(tmp_path: Path) -> None:
    path = saved(Manifest("speech", large(40)), tmp_path)
    whole, table = path.read_bytes(), load(path).table
    for place in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            found = load(path)
        except CorpusError as error:
            assert str(path) in str(error)
        else:  # in what nobody reads: statistics, encodings' lists
            assert found.table.equals(table), place


def test_a_manifest_of_another_dataset_is_not_taken(
    recipe: Recipe, speech: Path, tmp_path: Path, opened: Opened, capsys: Any
) -> None:
    first = prepared(recipe, speech, tmp_path / "out")
    table = first.manifests["speech"].table
    frames = pa.array([n + 1 for n in table["frames"].to_pylist()])
    changed = table.set_column(2, SCHEMA.field("frames"), frames)
    saved(Manifest("speech", changed), tmp_path / "out" / "manifests")
    opened.clear()
    assert prepared(recipe, speech, tmp_path / "out").identity == first.identity
    assert len(opened) == 4 and "was changed; corpus 'speech' is scanned" in capsys.readouterr().err
    assert load(tmp_path / "out" / "manifests" / "speech.parquet").sha256 == (
        first.manifests["speech"].sha256
    )
