"""Sentences for text-to-speech: of text files, or the project's own few."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from data_specs.io.errors import UserError
from data_specs.strict import digest, unknown
from data_specs.voice import Sentences, VoiceSpec, sentences

MARKUP = re.compile(r"[\[\]{}<>|\\/@=_*#~♪♫]")
"""Lines with these are songs, sound effects or leftovers of a subtitle's markup."""


class Texts(Protocol):
    """Sentences of one language; a list is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> str: ...


def sentence_of(line: str, rule: Sentences) -> str | None:
    """The sentence in a line of a text file, or None where it is not one to speak."""
    cells = line.rstrip("\r\n").split("\t")
    if len(cells) > 1 and len(cells) < rule.column:
        return None
    text = cells[rule.column - 1] if len(cells) > 1 else cells[0]
    text = " ".join(text.split()).lstrip("-–— ")  # subtitles mark a change of talker by a dash
    words = sum(any(map(str.isalpha, word)) for word in text.split())
    if MARKUP.search(text) or not rule.min_words <= words <= rule.max_words:
        return None
    return text


class TextFile:
    """The sentences of a UTF-8 text file that a rule keeps, read from the disk when asked for.

    Only their offsets are held in memory: MultiSubs has ten million English lines. Raises
    ``UserError`` where none is kept or a line is not UTF-8, ``OSError`` for an unreadable file.
    """

    def __init__(self, path: Path, rule: Sentences) -> None:
        self.path, self.rule = path, rule
        self.offsets = array("q")
        hashed, offset = hashlib.sha256(), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if sentence_of(self._decode(line, f"line {number}"), rule):
                    self.offsets.append(offset)
                hashed.update(line)
                offset += len(line)
        self.sha256 = hashed.hexdigest()
        if not self.offsets:
            raise UserError(
                f"{path}: no line is a sentence of {rule.min_words} to {rule.max_words} words; "
                f"write one a line, or in column {rule.column} between tabs"
            )

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int, /) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return sentence_of(self._decode(file.readline(), "a line"), self.rule) or ""

    def _decode(self, line: bytes, where: str) -> str:
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {where}: not UTF-8: {error}") from error


def parse_texts(options: Sequence[str], spec: VoiceSpec) -> dict[str, Texts]:
    """Texts of every language of the spec, from ``LANG=FILE`` options, else the project's own few.

    Raises ``UserError`` for a language that neither has, or that the spec does not speak.
    """
    files: dict[str, Path] = {}
    for option in options:
        language, equals, path = option.partition("=")
        if not equals or not path:
            raise UserError(f"--text {option}: write LANG=FILE")
        if language not in spec.languages:
            raise UserError(f"--text {option}: {unknown('language', language, spec.languages)}")
        files[language] = Path(path)
    texts: dict[str, Texts] = {}
    for language in spec.languages:
        if language in files:
            texts[language] = TextFile(files[language], spec.sentences)
        elif language in sentences(spec.texts):
            texts[language] = sentences(spec.texts)[language]
        else:
            raise UserError(f"no texts in language {language!r}: give --text {language}=FILE")
    return texts


def texts_digest(texts: Mapping[str, Texts]) -> str:
    """Hash of the sentences of every language."""
    return digest({name: getattr(text, "sha256", text) for name, text in texts.items()})
