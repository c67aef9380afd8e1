"""JSON from elsewhere: whole and of the right kind, or one sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_specs.io.errors import UserError


def json_object(
    data: bytes | str, where: str | Path, remedy: str = "make it again"
) -> dict[str, Any]:
    """Parse a JSON object; ``UserError`` naming ``where`` for anything else."""
    try:
        content = json.loads(data)
    except RecursionError:
        raise UserError(f"{where}: not JSON that is read: nested too deeply; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a JSON object; {remedy}")
    return content


def json_field(content: dict[str, Any], name: str, kind: type, where: str | Path) -> Any:
    """A field of such an object. ``UserError`` where it is missing or of another kind."""
    value = content.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: no {name!r} of kind {kind.__name__}; make it again")
    return value
