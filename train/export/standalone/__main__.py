"""``NAME score PATH...``: a line of CSV a file; exit status 1 where one could not be scored."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import load

ENDINGS = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au"}


def files_of(paths: Sequence[Path]) -> Iterator[Path]:
    """The files, and the audio files below the folders, in their order."""
    for path in paths:
        if path.is_dir():
            yield from sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in ENDINGS and file.is_file()
            )
        else:
            yield path


def main() -> int:
    """Score what the command line names."""
    parser = argparse.ArgumentParser(prog=__package__, description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    scoring = verbs.add_parser("score", help="mean opinion scores of files and folders, as CSV")
    scoring.add_argument("paths", nargs="+", type=Path)
    paths = list(files_of(parser.parse_args().paths))
    if not paths:
        print("error: no audio files there", file=sys.stderr)
        return 2
    table, failed = csv.writer(sys.stdout, lineterminator="\n"), 0
    table.writerow(("path", "mos"))
    for path in paths:
        try:
            table.writerow((path, f"{load().score_file(path):.3f}"))
        except ValueError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
