"""What tests of the pipeline's commands share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.__main__ import main

Says = Callable[..., str]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Run a command, hold it to its exit status, and give what it says on both streams."""

    def run(status: int, *words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == status
        return "".join(capsys.readouterr())

    return run
