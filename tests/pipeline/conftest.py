"""What tests of the pipeline's commands share."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from pipeline.__main__ import main

Says = Callable[..., str]


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of every file below ``folder`` whose name fits."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Run a command, hold it to its exit status, and give what it says on both streams."""

    def run(status: int, *words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == status
        return "".join(capsys.readouterr())

    return run
