"""A dataset labelled again is the one that would have been made with the other teacher."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from data_specs.recipe import Recipe
from data_specs.recipe import Teacher as TeacherSpec
from data_specs.sample import DATASET_FILE, SampleRecord, shard_name
from pipeline.__main__ import main
from pipeline.dataset import shards
from pipeline.dataset.description import WrongDataset, reopen
from pipeline.dataset.job import Job, Worker
from pipeline.dataset.prepare import prepare
from pipeline.dataset.preview import page
from pipeline.dataset.shards import ShardError, find_shards, read_record
from pipeline.engine.relabel import Relabeller
from pipeline.engine.relabel import prepare as prepare_again
from pipeline.render import label
from tests import engines
from tests.conftest import small_recipe
from tests.drills.drill_cluster import contents
from tests.pipeline.conftest import Says
from tests.pipeline.test_engines import quiet

SAMPLES = 10  # two shards of four and one of two
Corpora = dict[str, list[Path]]


def recipe(teacher: str = "mfcc") -> Recipe:
    named = {"name": teacher}
    return small_recipe(shard_samples=4, group_samples=2, max_dropped_share=1.0, teacher=named)


@pytest.fixture(scope="module")
def sources(corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """The corpora with noise of which a part is silent, so that samples are dropped."""
    return corpora | quiet(tmp_path_factory.mktemp("quiet"))


def make(sources: Corpora, out: Path, teacher: str) -> Path:
    """A dataset as a user makes it."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe(teacher).model_dump(mode="json", exclude_none=True)))
    options = [f"--corpus={name}={folders[0]}" for name, folders in sources.items()]
    verb = ["shards", str(path), *options, "--out", str(out), "--samples", str(SAMPLES)]
    assert main([*verb, "--engine", "local", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def source(sources: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(sources, tmp_path_factory.mktemp("source") / "old", "mfcc")


@pytest.fixture(scope="module")
def wanted(sources: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(sources, tmp_path_factory.mktemp("wanted") / "new", "distillmos")


def again(source: Path, out: Path, *options: str, teacher: str = "distillmos") -> list[str]:
    """The command that labels a dataset again."""
    verb = ["relabel", str(source), "--teacher", teacher, "--out", str(out), *options]
    return [*verb, "--engine", "local", "--workers", "1"]


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    assert main(again(source, out)) == 0
    return out


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A source to be damaged."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def records(folder: Path) -> dict[str, SampleRecord]:
    return {
        key: SampleRecord.model_validate_json(data)
        for shard in find_shards(folder)
        for key, _, data in shards.samples(folder / f"{shard_name(shard)}.tar")
    }


def test_every_file_is_that_of_a_dataset_made_with_the_other_teacher(
    made: Path, wanted: Path, source: Path
) -> None:
    assert contents(made) == contents(wanted)
    assert {"dataset.json", "README.md", "manifests/speech.parquet"} < set(contents(made))
    old, new = records(source), records(made)
    assert old.keys() == new.keys() and all(old[key].mos != new[key].mos for key in old)
    dropped = [r.dropped for s in find_shards(made) if (r := read_record(made, s))]
    assert any(dropped) and {d["reason"] for drops in dropped for d in drops} == {"silent"}


def test_a_teacher_with_packages_of_its_own_is_in_the_identity(
    made: Path, source: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back"
    assert main(again(made, back, teacher="mfcc")) == 0
    assert contents(back) == contents(source)
    versions = [reopen(folder, {}).identity["versions"] for folder in (made, back)]
    assert ["torchaudio" in packages for packages in versions] == [False, True]


def test_the_new_folder_verifies_replays_and_can_be_listened_to(
    made: Path, sources: Corpora, says: Says
) -> None:
    assert main(["verify", str(made), "--deep"]) == 0
    options = [f"--corpus={name}={folders[0]}" for name, folders in sources.items()]
    assert "the same audio" in says(0, "replay", min(records(made)), "--dataset", made, *options)
    assert page(made, 3).count("<audio") == 3


def test_shards_takes_it_for_its_own(made: Path, sources: Corpora) -> None:
    before = contents(made)
    assert prepare(recipe("distillmos"), sources, made, SAMPLES).todo() == []
    assert contents(made) == before


def test_interrupted_it_goes_on(made: Path, source: Path, tmp_path: Path, says: Says) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    (out / "shard-000001.json").unlink()
    tar = out / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-1000])
    kept = (out / "shard-000000.tar").stat().st_mtime_ns
    last = says(0, *again(source, out))
    assert re.search(r"2 shards made \(.* x real time\), 1 were whole already", last)
    assert contents(out) == contents(made)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == kept


# --- what is refused ------------------------------------------------------------------------------


def test_the_source_is_never_written_to(source: Path, tmp_path: Path, says: Says) -> None:
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / ".." / source.name, tmp_path / "link"):
        assert "is the source itself" in says(2, *again(source, out))
    assert contents(source) == before


def test_a_folder_of_another_dataset_is_refused(source: Path, made: Path, says: Says) -> None:
    before = contents(made)
    said = says(2, *again(source, made, "--precision", "bf16"))
    assert 'recipe.teacher.precision: "fp32" there, "bf16" asked for' in said
    assert contents(made) == before


@pytest.mark.parametrize(
    ("teacher", "options", "said"),
    [
        ("nobody", (), "unknown teacher 'nobody'"),
        ("No Body", (), "--teacher, --precision: name"),
        ("dnsmos", ("--precision", "bf16"), "fp32 only"),
        ("distillmos", ("--batch", "-1"), "--batch"),
        ("distillmos", ("--teacher-actors", "1"), "--teacher-actors needs --engine ray"),
    ],
)
def test_a_teacher_that_cannot_be_had_is_told_before_any_work(
    teacher: str,
    options: tuple[str, ...],
    said: str,
    source: Path,
    tmp_path: Path,
    says: Says,
) -> None:
    assert said in says(2, *again(source, tmp_path / "out", *options, teacher=teacher))
    assert not (tmp_path / "out").exists()


def test_what_is_no_dataset_is_refused(tmp_path: Path, says: Says) -> None:
    assert "no dataset.json" in says(2, *again(tmp_path, tmp_path / "out"))


def cut(copy: Path) -> None:
    tar = copy / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1000])


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda copy: (copy / "shard-000001.tar").unlink(),
            "1 of 3 shards are not whole; first: .*shard-000001.tar: missing",
        ),
        (lambda copy: (copy / "shard-000001.json").unlink(), "shard-000001.tar: no record"),
        (cut, "shard-000001.tar: .*truncated"),
        (
            lambda copy: change(copy / "shard-000001.json", dataset_hash="f" * 64),
            "shard-000001.tar: its record belongs to another dataset",
        ),
        (  # as an extension that was interrupted leaves a folder
            lambda copy: change(copy / DATASET_FILE, samples=SAMPLES + 4),
            "2 of 4 shards are not whole; first: .*shard-000002.tar: 2 samples missing",
        ),
    ],
)
def test_a_source_that_is_not_whole_is_refused(
    damage: object, said: str, copy: Path, tmp_path: Path, says: Says
) -> None:
    damage(copy)  # type: ignore[operator]
    told = says(2, *again(copy, tmp_path / "out"))
    assert re.search(said, told) and f"python -m pipeline shards ... --out {copy}" in told
    assert not (tmp_path / "out").exists()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("member", ["flac", "json"])
def test_a_corrupted_member_is_named_and_the_other_shards_are_made(
    member: str, copy: Path, tmp_path: Path, says: Says
) -> None:
    path = copy / "shard-000001.tar"
    with tarfile.open(path) as tar:
        info = next(info for info in tar if info.name.endswith(member))
    flip(path, info.offset_data + info.size // 2)
    told = says(1, *again(copy, tmp_path / "out"))
    failed = next(line for line in told.splitlines() if line.startswith("failed: shard-000001"))
    assert "content differs from its record's hash: corrupted" in failed
    assert "Remove shard-000001.json" in failed
    if member == "flac":
        assert info.name in failed
    assert find_shards(tmp_path / "out") == [0, 2]


def test_audio_that_is_not_its_records_gets_no_label(copy: Path, tmp_path: Path) -> None:
    # The shard as such is in order: only the hash inside a sample's record tells.
    old, before = reopen(copy, {}), read_record(copy, 1)
    assert before is not None
    rows = [shards.Row(d["key"], None, None, d["reason"], d["detail"]) for d in before.dropped]
    for key, flac, data in shards.samples(copy / "shard-000001.tar"):
        record = SampleRecord.model_validate_json(data)
        rows.append(shards.Row(key, flac, data.replace(record.pcm_sha256.encode(), b"0" * 64)))
    shards.commit(copy, 1, rows, old.dataset_hash, 1.0, old.identity["versions"])
    job = prepare_again(old, tmp_path / "out", TeacherSpec())
    outcome = engines.run(job, "local", 1, factory=partial(Relabeller, source=old))
    assert outcome.made == [0, 2]
    first = next(row.key for row in rows if row.flac)
    assert f"{first}.flac: audio differs" in outcome.failed[1]


def test_other_packages_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = reopen(source, {})
    old.identity["versions"]["torch"] = "1.0"
    monkeypatch.setattr(Job, "todo", lambda job: [])
    with pytest.raises(ShardError, match=r'other packages than the dataset: torch: "1\.0" there'):
        prepare_again(old, tmp_path / "out", TeacherSpec())


# --- what a teacher sees, and says ----------------------------------------------------------------


class Calibration(BaseModel):
    scale: float = 1.5


class BatchTeacher:
    """Has no logit; its scores depend on all that is scored at once, as a GPU's last bits do."""

    name = "batch"
    weights_sha256 = "c" * 64
    calibration = Calibration()

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def score(self, waves_BT: np.ndarray) -> tuple[np.ndarray, None]:
        self.seen.append(len(waves_BT))
        loudness_B = np.abs(waves_BT).mean(axis=1)
        return (1 + loudness_B + len(waves_BT) * loudness_B.sum()).astype(np.float32), None


def test_samples_are_scored_in_the_groups_in_which_they_were_made(
    source: Path, sources: Corpora, tmp_path: Path
) -> None:
    seen: list[int] = []
    seen_again: list[int] = []
    (tmp_path / "again").mkdir()
    job = prepare(recipe(), sources, tmp_path / "made", SAMPLES)
    engines.run(job, "local", 1, factory=lambda job, _: Worker(job, BatchTeacher(seen)))
    old = reopen(source, {})
    job = replace(old, out=tmp_path / "again")
    factory = partial(Relabeller, source=old)
    engines.run(job, "local", 1, factory=lambda job, _: factory(job, BatchTeacher(seen_again)))
    assert seen == seen_again and 1 in seen and 2 in seen  # with drops, and without
    assert records(tmp_path / "again") == records(tmp_path / "made")
    assert {record.logit for record in records(tmp_path / "again").values()} == {None}


def test_a_batch_may_be_larger_than_a_group(source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    old = reopen(source, {})
    job = replace(old, out=tmp_path)
    factory = partial(Relabeller, source=old, batch=100)
    engines.run(job, "local", 1, factory=lambda job, _: factory(job, BatchTeacher(seen)))
    assert seen == [r.samples for s in find_shards(source) if (r := read_record(source, s))]
    assert records(tmp_path).keys() == records(source).keys()


def test_the_teachers_calibration_stands_in_the_dataset_and_is_not_its_identity(
    source: Path, sources: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = json.loads((source / DATASET_FILE).read_bytes())
    assert plain["teacher_calibration"] is None
    monkeypatch.setattr(label, "identify", lambda *_: BatchTeacher([]))
    prepare(recipe(), sources, tmp_path / "made", SAMPLES)
    prepare_again(reopen(source, {}), tmp_path / "again", TeacherSpec(name="mfcc"))
    for folder in ("made", "again"):
        about = json.loads((tmp_path / folder / DATASET_FILE).read_bytes())
        assert about["teacher_calibration"] == {"scale": 1.5}
        assert about["identity"] == plain["identity"] | {"teacher_sha256": "c" * 64}
        assert reopen(tmp_path / folder, {}).teacher_calibration == {"scale": 1.5}


def test_other_weights_under_the_same_name_are_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label, "load", lambda *_: BatchTeacher([]))
    with pytest.raises(ShardError, match=r"'batch' has other weights on this machine \(cccc"):
        reopen(source, {}).load_teacher()


def test_an_out_with_shards_of_nobody_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(WrongDataset, match="has shards but no dataset"):
        prepare_again(reopen(source, {}), tmp_path, TeacherSpec())
