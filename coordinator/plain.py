"""Frozen values to JSON text and back, with one set of rules for registry and journal."""

from __future__ import annotations

import enum
import json
from typing import TypeVar

import cattrs

from coordinator.errors import DatabaseError

T = TypeVar("T")
E = TypeVar("E", bound=enum.Enum)
_CONVERTER = cattrs.Converter()


def to_json(value: object) -> str:
    """The value (frozen dataclasses, enums, tuples, plain values) as JSON text."""
    return json.dumps(_CONVERTER.unstructure(value), separators=(",", ":"))


def from_json(text: str, kind: type[T]) -> T:
    """The value of type `kind` written in `text`; raises `DatabaseError` when it is not one.

    Unknown keys are let pass, so that an older program still reads what a newer one of the same schema added.
    """
    try:
        return _CONVERTER.structure(json.loads(text), kind)
    except (ValueError, cattrs.BaseValidationError) as error:
        raise DatabaseError(
            f"the registry holds a {kind.__name__} that cannot be read: it was written by another version or is "
            "damaged; install that version, or put back a copy of the registry (docs/JOURNAL.md)"
        ) from error


def one_of(kind: type[E], word: str) -> E:
    """The word of that enum; raises `DatabaseError` when it is none."""
    try:
        return kind(word)
    except ValueError as error:
        raise DatabaseError(
            f"the registry holds the {kind.__name__} {word!r}, which is none: it was written by another version or is "
            "damaged; install that version, or put back a copy of the registry (docs/JOURNAL.md)"
        ) from error
