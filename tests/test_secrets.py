"""Credentials in an address land in no file and in no message, whatever is done with a model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.export_helpers import write_run
from tests.servers import Quiet, secrets_in, serving
from tests.train_helpers import state_sha256, write_dataset, write_rated
from train.__main__ import main
from train.export import export
from train.scoring import bundle

pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'fsspec[http]'")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'fsspec[http]'")

SECRETS = ("alice", "pa55word", "5ignature")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address, with a place for a folder's name, of a bundle and of shards."""
    monkeypatch.setattr("data_specs.io.retry.WAITS_S", ())
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    bundle.write_checksums(write_run(tmp_path / "site" / "tiny"))
    for tar in write_dataset(tmp_path / "site" / "shards", validation=4).glob("*.tar"):
        state_sha256(tar)
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with serving(handler) as host:
        yield f"http://{':'.join(SECRETS[:2])}@{host}/NAME?X-Amz-Signature={SECRETS[2]}"


@pytest.mark.slow
def test_no_credentials_in_any_output(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, shards = site.replace("NAME", "tiny"), site.replace("NAME", "shards")
    rated, out = write_rated(tmp_path / "rated", 8), tmp_path / "out"
    out.mkdir()
    seen: list[str] = []

    def networks(source: export.Source, made: Path, sha256: str, args: object) -> list[Path]:
        name = source.about["made_from"]["model"]
        seen.append(name)  # what goes into the metadata of an ONNX file
        return []

    monkeypatch.setattr(export, "write_networks", networks)
    runs = [
        ["score", str(rated.parent), "--model", model, "--out", f"{out}/scores.csv"],
        ["score", str(rated.parent), "--model", model, "--out", f"{out}/scores.parquet"],
        ["evaluate", "--model", model, "--rated", str(rated), "--out", f"{out}/evaluation"],
        ["export", "--model", model, "--out", f"{out}/bundle"],
        [
            *("fit", "--student", "v1", "--shards", shards, "--out", f"{out}/run", "--batch", "4"),
            *("--steps", "2", "--workers", "0", "--validate-every", "1"),
        ],
        ["report", "--run", f"{out}/run", "--evaluation", f"{out}/evaluation"]
        + ["--out", f"{out}/r.html"],
        # Errors: no int8 in it; nothing there.
        ["score", str(rated), "--model", model, "--precision", "int8", "--out", f"{out}/s.csv"],
        ["score", str(rated), "--model", model.replace("tiny", "no"), "--out", f"{out}/s.csv"],
    ]
    statuses = [main(words) for words in runs]
    said = capfd.readouterr()
    assert statuses == [0] * 6 + [2] * 2, said.err
    assert seen == ["tiny"]
    assert len([path for path in out.rglob("*") if path.is_file()]) > 15
    assert secrets_in(out, SECRETS) == [] and secrets_in(tmp_path / "cache", SECRETS) == []
    assert [secret for secret in SECRETS if secret in said.out + said.err] == []
