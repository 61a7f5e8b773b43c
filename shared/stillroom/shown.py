"""Text of somebody else's, as it may stand in a log or on a terminal.

A visitor chooses a User-Agent, a producer the names in a message. Printed as they are, their control characters
forge log lines, colour a terminal, or hide what stands before them. Everything that goes to a person passes here.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING
from unicodedata import category

if TYPE_CHECKING:
    from pydantic import ValidationError

CUT = "…"
COMPLAINTS = 5  # told of one message
FIELD_LENGTH = 60  # characters of a field's name


def shown(text: object, limit: int | None = None) -> str:
    """Return the text with everything that is not printable written out, `\\x1b` or `\\u202e`, on one line.

    What a line break, an escape sequence, a right-to-left override or a lone surrogate does to a terminal or a log,
    its name does not. `limit` is the most characters to show; what is longer ends in `…`.

    >>> shown("a\\nb\\x1b[31m\\u202e"), shown("Jürgen 王"), shown("abcdef", 4)
    ('a\\\\nb\\\\x1b[31m\\\\u202e', 'Jürgen 王', 'abc…')
    """
    plain = str(text)
    if limit is not None and len(plain) > limit:
        plain = plain[: max(0, limit - len(CUT))] + CUT
    if plain.isprintable():
        return plain
    return "".join(map(_named, plain))


def complaints(error: ValidationError) -> str:
    """Return what does not fit, of the first fields: their names, which a producer may choose, and no contents."""
    told = [
        f"{shown('.'.join(map(str, detail['loc'])) or 'arguments', FIELD_LENGTH)}: {detail['msg']}"
        for detail in islice(error.errors(include_url=False, include_input=False), COMPLAINTS)
    ]
    more = error.error_count() - len(told)
    return "; ".join([*told, *([f"and {more:,} more"] if more else [])])


def plural(many: int, one: str, more: str | None = None) -> str:
    """Return how many there are of a thing, by its name: `more`, or `one` and an s.

    >>> plural(1, "dead letter"), plural(2_000, "dead letter"), plural(0, "entry", "entries")
    ('1 dead letter', '2,000 dead letters', '0 entries')
    """
    return f"{many:,} {named(many, one, more)}"


def named(many: int, one: str, more: str | None = None) -> str:
    """Return the name of a thing of which there are so many.

    >>> named(1, "session"), named(2, "session")
    ('session', 'sessions')
    """
    return one if many == 1 else more or one + "s"


def shown_lines(text: str) -> str:
    """Return several lines, as of a traceback, each of them shown. All but the first are indented, so that none
    looks like a new entry.
    """
    first, *rest = text.splitlines() or [""]
    return "\n".join([shown(first), *(f"  {shown(line)}" for line in rest)])


def visible(text: str) -> str:
    """Return the text with control and format characters, and lone surrogates, written out. All spaces stay.

    >>> visible("a\u202e\x1b[31m"), visible("95\u202f%")
    ('a\\\\u202e\\\\x1b[31m', '95\\u202f%')
    """
    if text.isprintable():
        return text
    return "".join(one if category(one)[0] != "C" else _named(one) for one in text)


def message_of(error: BaseException) -> str:
    """Return what an error says, or its class where its own code fails at that: an app's classes may be broken."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


def repr_of(error: BaseException) -> str:
    """Return an error as logs name it, `KeyError('x')`, or its class where its own code fails at that."""
    try:
        return repr(error)
    except Exception:
        return type(error).__name__


def _named(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]
