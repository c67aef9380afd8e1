"""A model as it is passed on: fetched, verified, kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Served, serving_folder
from train.scoring import bundle

WEIGHTS, ABOUT = b"weights" * 1000, b'{"student": "tiny"}'


def write_bundle(folder: Path, weights: bytes = WEIGHTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "model.json").write_bytes(ABOUT)
    (folder / "model.onnx").write_bytes(b"onnx")
    (folder / "secret.txt").write_bytes(b"not part of it")
    bundle.write_checksums(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("data_specs.io.retry.WAITS_S", ())
    return tmp_path / "cache" / "models"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving_folder(write_bundle(tmp_path / "site")) as site:
        yield site


def test_checksums_name_the_bundles_files_and_no_others(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    named = json.loads((folder / "checksums.json").read_text())["files"]
    assert set(named) == {"model.safetensors", "model.json", "model.onnx"}
    assert named["model.json"]["bytes"] == len(ABOUT)
    bundle.verify(folder)
    (folder / "model.onnx").write_bytes(b"onnX")
    with pytest.raises(ValueError, match=r"model\.onnx: missing or not what checksums\.json says"):
        bundle.verify(folder)


def test_only_what_is_wanted_is_fetched_and_once(served: Served, cache: Path) -> None:
    folder = bundle.fetch(served.address)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "model.json").read_bytes() == ABOUT
    assert folder.parent == cache
    assert list(served.asked) == ["checksums.json", "model.safetensors", "model.json"]
    served.asked.clear()
    assert bundle.fetch(served.address) == folder
    assert served.asked == {"checksums.json": 1}


def test_one_file_by_its_address(served: Served) -> None:
    assert bundle.fetch(f"{served.address}/model.onnx").read_bytes() == b"onnx"
    assert "model.safetensors" not in served.asked
    with pytest.raises(ValueError, match=r"the bundle has no model\.int8\.onnx"):
        bundle.fetch(f"{served.address}/model.int8.onnx")
    assert bundle.fetch(served.address + "/?token=x", "model.onnx").read_bytes() == b"onnx"


def test_a_new_export_is_seen_and_nothing_is_mixed(served: Served) -> None:
    before = bundle.fetch(served.address)
    write_bundle(served.folder, b"other weights")
    after = bundle.fetch(served.address)
    assert (after / "model.safetensors").read_bytes() == b"other weights"
    assert (before / "model.safetensors").read_bytes() == WEIGHTS


def test_without_a_network_the_last_one_is_used(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    address = served.address.replace("://", "://user:hush@") + "/?token=hush"
    folder = bundle.fetch(address)
    served.misdeed = lambda handler: True  # closes the connection
    assert bundle.fetch(address) == folder
    told = capsys.readouterr().err
    assert "using what was fetched last" in told and "hush" not in told
    with pytest.raises(OSError, match="cannot be read") as caught:
        bundle.fetch(served.address + "/never?token=hush")
    assert "hush" not in str(caught.value)


def test_what_was_damaged_here_is_fetched_again(served: Served) -> None:
    folder = bundle.fetch(served.address)
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")
    assert (bundle.fetch(served.address) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("content", [WEIGHTS[:-1] + b"!", WEIGHTS[:10], WEIGHTS + b"more"])
def test_what_is_not_what_it_says_is_refused(served: Served, cache: Path, content: bytes) -> None:
    (served.folder / "model.safetensors").write_bytes(content)
    with pytest.raises(OSError, match=r"model\.safetensors: cannot be read"):
        bundle.fetch(served.address)
    assert not list(cache.rglob("*model*"))


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"files": {"model.json": {"bytes": -1, "sha256": ""}}}', '{"files": {}, "x": 1}'],
)
def test_checksums_that_are_none(served: Served, text: str) -> None:
    (served.folder / "checksums.json").write_text(text)
    with pytest.raises(ValueError, match=r"checksums\.json: not a bundle's checksums"):
        bundle.fetch(served.address)


def test_no_bundle_there(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no bundle there"):
        bundle.fetch(served.address + "/nowhere")
    with pytest.raises(ValueError, match="is missing: is this what"):
        bundle.fetch(f"file://{tmp_path}")
    with pytest.raises(ValueError, match="such addresses are not read"):
        bundle.fetch("ftp://host/bundle")


def test_from_a_folder_by_file_address_and_from_memory(tmp_path: Path) -> None:
    import fsspec

    folder = write_bundle(tmp_path / "a folder")
    assert bundle.fetch(folder.as_uri()) == folder
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/models/tiny", recursive=True)
    found = bundle.fetch("memory://models/tiny")
    assert (found / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(path.name for path in found.iterdir()) == [
        "checksums.json",
        "model.json",
        "model.safetensors",
    ]


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    folder = write_bundle(tmp_path / "snapshot")

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert bundle.fetch("hf://org/name") == folder
    assert bundle.fetch("hf://org/name@v2/model.onnx") == folder / "model.onnx"
    assert asked == [
        ("org/name", None, ["model.safetensors", "model.json", "checksums.json"]),
        ("org/name", "v2", ["model.onnx", "checksums.json"]),
    ]
    (folder / "model.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"model\.json: missing or not what"):
        bundle.fetch("hf://org/name")
    with pytest.raises(ValueError, match="spell it hf://org/name"):
        bundle.fetch("hf://name")


def test_the_hubs_errors_keep_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise RuntimeError("401 with token hush")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match="hf://org/name: cannot be fetched: RuntimeError") as caught:
        bundle.fetch("hf://org/name")
    assert "hush" not in str(caught.value) and caught.value.__cause__ is None
