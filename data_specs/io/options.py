"""Command-line options made from a pydantic model: a default and a description are said once."""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def add_options(
    parser: argparse._ActionsContainer, model: type[BaseModel], leave_out: Collection[str] = ()
) -> None:
    """Add an option for each field of a model that has a description and is not left out.

    The name, the kind, the choices and the default are the field's, and its description is the
    help. A field without a default, or with None, is None where the option is not given.
    """
    for name, field in model.model_fields.items():
        if field.description and name not in leave_out:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            shown = f" (default: {_spelled(default)})" if default not in (None, "", False) else ""
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                default=default,
                help=(field.description + shown).replace("%", "%%"),
                **_kind(field),
            )


def options_of(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """Take a model's fields out of parsed options; those that are None are left out."""
    return {k: v for k, v in vars(args).items() if k in model.model_fields and v is not None}


def _spelled(default: Any) -> str:
    if isinstance(default, tuple | list):
        return " ".join(map(_spelled, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _kind(field: FieldInfo) -> dict[str, Any]:
    """The keywords of ``add_argument`` for a field's type; pydantic checks the range later."""
    kind = _plain(field.annotation)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) in (tuple, list):
        return {"nargs": "+", "type": _plain(get_args(kind)[0])}
    return {"type": kind}


def _plain(annotation: Any) -> Any:
    """A type without ``Annotated`` and without ``| None``."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _plain(kinds[0])
    return annotation
