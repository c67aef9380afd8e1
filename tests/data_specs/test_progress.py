"""Progress in a log is lines, and few of them."""

from __future__ import annotations

import io
import sys

import pytest

from data_specs.io import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines_and_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    monkeypatch.setattr(progress, "BRIEF_S", 0.0)
    assert list(progress.progress_bar(range(3), desc="scan speech", unit="file")) == [0, 1, 2]
    told = capsys.readouterr().err
    lines = told.splitlines()
    assert "\r" not in told and all(line.startswith("scan speech: ") for line in lines)
    assert "0/3" in lines[0] and "3/3" in lines[-1]


def test_what_is_said_behind_a_bar_waits_for_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BRIEF_S", 0.0)
    with progress.progress_bar(total=300) as bar:
        for step in range(300):
            bar.set_postfix_str(f"loss {step}")
            bar.set_postfix(loss=step)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "loss=299" in lines[-1]


def test_what_is_brief_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(total=2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress.progress_bar(range(3)))
    assert terminal.getvalue().count("\r") >= 2
