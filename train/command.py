"""The command line that made a result, for its table or page."""

from __future__ import annotations

import argparse
import datetime
import shlex
from collections.abc import Callable

from data_specs.io.addresses import redacted


def command_of(
    verb: str, args: argparse.Namespace, add: Callable[[argparse.ArgumentParser], None]
) -> str:
    """The shortest command line that gives these options."""
    parser = argparse.ArgumentParser()
    add(parser)
    parts = ["python", "-m", "train", verb]
    for name, value in vars(args).items():
        if value is None or value == parser.get_default(name):
            continue
        parts.append(f"--{name.replace('_', '-')}")
        if value is not True:
            # What is shown is written into pages and results: no address with its credentials.
            given = value if isinstance(value, list) else [value]
            parts += [redacted(str(one)) for one in given]
    return shlex.join(parts)


def made_by(
    verb: str, args: argparse.Namespace, add: Callable[[argparse.ArgumentParser], None]
) -> dict[str, str]:
    """The command line and the day (UTC) of a result."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"command": command_of(verb, args, add), "date": day}
