"""The base of every spec type, and the one way to load a spec from YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data_specs.io.errors import UserError

HERE = Path(__file__).resolve().parent


class SpecError(UserError):
    """A spec is wrong; the message names file, YAML path and what to do."""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and names the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise UserError(unknown("key", str(key), cls.model_fields))
        return data


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say that ``name`` is not among ``known``, and which of them is nearest."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(names)}"
    return f"unknown {what} {name!r}; {hint}"


Model = TypeVar("Model", bound=BaseModel)


def load(model: type[Model], path: Path | str) -> Model:
    """Read the YAML file ``path`` as a ``model``.

    Raises ``SpecError`` that names the file, the YAML path (``stages[0].choices[1].kind``) and the
    nearest valid key.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SpecError(f"{path}: not readable as YAML: {error}") from error
    return checked(model, data, path)


def checked(model: type[Model], data: Any, where: Path | str) -> Model:
    """``data`` as a ``model``; ``SpecError`` naming ``where`` and each field that is wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError(describe(error, data, str(where))) from error


def describe(error: ValidationError, data: Any, where: str) -> str:
    """Turn a pydantic error into lines of ``file: yaml.path: message``."""
    lines = []
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "string_type" and item["input"] is not None:
            message += ": write it in quotes"
        lines.append(f"{where}: {_yaml_path(item['loc'], data)}: {message}")
    return "\n".join(lines)


def _yaml_path(loc: tuple[int | str, ...], data: Any) -> str:
    """Spell a pydantic location as a YAML path, without the union tags that the file has not."""
    path = ""
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(part, int):
            path += f"[{part}]"
            data = data[part] if isinstance(data, list) and part < len(data) else None
        elif (isinstance(data, dict) and part in data) or last:
            path += f".{part}" if path else part
            data = data.get(part) if isinstance(data, dict) else None
    return path or "(top level)"


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
