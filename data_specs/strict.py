"""The base of every spec type, and the one way to load a spec from YAML."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_specs.io.errors import UserError

HERE = Path(__file__).resolve().parent

MOST_BYTES, MOST_DEPTH, MOST_VALUES = 1 << 20, 50, 100_000
"""Of a YAML file: its length, how deep its values are nested, and how many there are once every
alias is written out."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=80)]
"""What specs call things: names become file names, folders, variables and parts of commands."""


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
    return checked(model, read_yaml(path), path)


def load_named(model: type[Model], folder: str, name: Path | str) -> Model:
    """Read a spec at a path; a bare name means ``data_specs/FOLDER/NAME.yaml``."""
    path = Path(name)
    return load(model, path if path.suffix in (".yaml", ".yml") else HERE / folder / f"{name}.yaml")


def checked(model: type[Model], data: Any, where: Path | str) -> Model:
    """``data`` as a ``model``; ``SpecError`` naming ``where`` and each field that is wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError(describe(error, data, str(where))) from error


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file. ``SpecError`` naming file and line where it is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise SpecError(f"{path}: longer than {MOST_BYTES} bytes: not a spec")
    try:
        return yaml.load(content.decode("utf-8-sig"), _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        told = error.problem or error.context
        raise SpecError(f"{path}: line {line}: not readable as YAML: {told}") from error
    except yaml.reader.ReaderError as error:
        line = content.decode("utf-8-sig").count("\n", 0, error.position) + 1
        told = f"character #x{error.character:02x} is not allowed"
        raise SpecError(f"{path}: line {line}: not readable as YAML: {told}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{path}: line {line}: not UTF-8: save it as UTF-8") from error


class _Loader(yaml.SafeLoader):
    """YAML as specs need it: every key once, bounded in depth and in what aliases repeat."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Nodes are composed by recursion; an alias gives the node that it names again."""
        event, self._depth = self.peek_event(), self._depth + 1
        if self._depth > MOST_DEPTH:
            raise _wrong(event.start_mark, f"nested more than {MOST_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _wrong(
                    event.start_mark, f"alias {event.anchor!r} stands within what it names"
                )
            return node
        _require_keys_once(node)
        self._sizes[id(node)] = size = 1 + sum(self._sizes[id(n)] for n in _children(node))
        if size > MOST_VALUES:
            raise _wrong(event.start_mark, f"more than {MOST_VALUES} values, aliases written out")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML's own, which raises whatever Python does for a tag that does not fit."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _wrong(node.start_mark, f"{str(node.value)[:40]!r} is no {kind}") from error


def _require_keys_once(node: yaml.Node) -> None:
    """Refuse a key that stands twice: the second would silently win."""
    keys: set[tuple[str, str]] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in keys:
                raise _wrong(key.start_mark, f"key {key.value!r} stands twice")
            keys.add((key.tag, key.value))


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _wrong(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


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


def differences(
    before: Any, now: Any, path: str = "", between: tuple[str, str] = ("there", "asked for")
) -> Iterator[str]:
    """Say where two JSON-able values differ, as lines with the path of the field."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            where = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), now.get(key), where, between)
    elif before != now:
        yield f"{path}: {_short(before)} {between[0]}, {_short(now)} {between[1]}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
