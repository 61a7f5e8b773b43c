"""Templates of keys and tags: `product:{id}`. Pure."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple

from stillroom.cache.arguments import Text, Unkeyable
from stillroom.errors import InvalidKey, did_you_mean
from stillroom.keys import sanitized

HASHED = "\x1e"  # between the readable front of a long key and its hash; in Redis it is %1E
FRONT = 200  # characters
PREFIX = 100  # bytes
_HEXADECIMAL = frozenset("0123456789ABCDEF")
# A parameter as Flask's and Django's paths have it, Python's % and string.Template, and Jinja.
_FOREIGN = re.compile(
    r"<(?:\w+(?:\([^)]*\))?:)?([^\W\d]\w*)>|%\(([^\W\d]\w*)\)s|\$([^\W\d]\w*)|\{\{\s*([^\W\d]\w*)\s*\}\}"
)


class Piece(NamedTuple):
    """Text of the template, a parameter that follows it, and the character that ends the parameter's value."""

    literal: str
    name: str = ""
    end: str = ""


class Template:
    """`product:{id}`: text with the names of parameters in braces.

    Different arguments never make the same key: in each value but the last, the character that ends it in the
    template is written as %XX (and % as %25).
    """

    def __init__(
        self,
        text: str,
        parameters: Sequence[str],
        text_of: Callable[[str], Text] = lambda _: str,
        *,
        escapes: bool = True,
    ) -> None:
        """`text_of` is given a parameter's name, and returns what makes the text of its arguments.

        `escapes`: False for a tag, which is to be the text that a person writes.
        """
        if not isinstance(text, str):
            raise InvalidKey(text, f"a template is a str, not {type(text).__name__}")
        if not text:
            raise InvalidKey(text, "a template has at least one character")
        self.text = text
        pieces = list(_parsed(text, parameters))
        self.names = [piece.name for piece in pieces if piece.name]
        refuse_foreign(text, parameters, self.names)
        # Templates of one shape make the same texts of the same arguments, whatever their parameters are called.
        self.shape = [(piece.literal, bool(piece.name)) for piece in pieces]
        self.head = pieces[0].literal if pieces else ""  # the beginning of all its texts
        self._parts = [
            (p.literal, p.name, p.name and text_of(p.name), p.end if escapes else "")
            for p in pieces
        ]

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the text for these arguments. Raises Unkeyable."""
        filled = name = ""
        try:
            for literal, name, text, end in self._parts:
                filled += literal
                if text:
                    value = text(values[name])
                    filled += _escaped(value, end) if end else value
        except Unkeyable as error:
            raise Unkeyable(f"{name}: {error}") from None
        return filled

    def read(self, text: str) -> dict[str, str] | None:
        """Return what stands in a text for each parameter; None for a text that `fill` never makes.

        >>> Template("product:{id}:{lang}", ["id", "lang"]).read("product:7:de")
        {'id': '7', 'lang': 'de'}
        """
        form = "".join(
            [re.escape(p[0]) + (_value_before(p[3]) if p[1] else "") for p in self._parts]
        )
        match = re.fullmatch(form, text, re.DOTALL)
        if match is None:
            return None
        found: dict[str, str] = {}
        ends = [(name, end) for _, name, _, end in self._parts if name]
        for (name, end), written in zip(ends, match.groups(), strict=True):
            value = _unescaped(written, end) if end else written
            if found.setdefault(name, value) != value:
                return None
        return found


def prefix_of(text: str) -> bytes:
    """Return what all keys begin with, as they stand in Redis, that begin with this text."""
    return up_to_escape(sanitized(text)) if text else b""


def up_to_escape(name: bytes) -> bytes:
    """Return the beginning of a key as it stands in Redis, up to the first escaped character.

    If it begins with one, that is `%`, and not nothing: with nothing all keys begin.
    """
    return name.partition(b"%")[0][:PREFIX] or name[:1]


def refuse_foreign(text: str, parameters: Iterable[str], filled: Iterable[str]) -> None:
    """Raise InvalidKey for a parameter that is written in another language's way: it would stay as it is written.

    `filled`: the parameters that are in braces. What else is said of them is text.
    """
    known = {*parameters}.difference(filled)
    for found in _FOREIGN.finditer(text) if known else ():
        name = next(filter(None, found.groups()))
        if name in known:
            raise InvalidKey(
                text,
                f"a parameter is written {{{name}}}; did you mean {text.replace(found[0], f'{{{name}}}')!r}?",
            )


def fitting(text: str) -> tuple[str, bytes]:
    """Return a key as it can be stored, and its name in Redis.

    It is the text itself, or, where that is too long or no UTF-8, its front and its hash.
    """
    if HASHED not in text:
        try:
            return text, sanitized(text)
        except InvalidKey:
            pass
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    front = text[:FRONT].encode("utf-8", "replace").decode().replace(HASHED, "?")
    short = f"{front}{HASHED}{digest}"
    return short, sanitized(short)


def _escaped(value: str, end: str) -> str:
    """Escape the value's end character. The escapes do not contain it."""
    if end == "%":
        return value.replace("~", "~t").replace("%", "~p")
    if end not in value and "%" not in value:
        return value
    if end in _HEXADECIMAL or end > "\xff":  # %XX would hold it, or begin as %25 does
        return value.replace("%", "%p").replace(end, "%e")
    return value.replace("%", "%25").replace(end, f"%{ord(end):02X}")


def _value_before(end: str) -> str:
    """Return the form of a value that this character ends: it is not in it."""
    return f"([^{re.escape(end)}]*)" if end else "(.*)"


def _unescaped(written: str, end: str) -> str:
    """Return the value of which `_escaped` made this."""
    if end == "%":
        return written.replace("~p", "%").replace("~t", "~")
    if end in _HEXADECIMAL or end > "\xff":
        return written.replace("%e", end).replace("%p", "%")
    return written.replace(f"%{ord(end):02X}", end).replace("%25", "%")


def _parsed(text: str, parameters: Sequence[str]) -> Iterator[Piece]:
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise InvalidKey(text, f"not a template: {error}") from None
    followed = zip(pieces, [*(literal for literal, *_ in pieces[1:]), ""], strict=True)
    for (literal, name, spec, conversion), following in followed:
        if name is None:
            yield Piece(literal)
            continue
        more = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        _check(text, name, more, parameters)
        yield Piece(literal, name, following[:1])
    _check_gaps(text, pieces)


def _check(text: str, name: str, more: str, parameters: Iterable[str]) -> None:
    if more or not name.isidentifier():
        raise InvalidKey(
            text, f"{{{name}{more}}}: only the name of a parameter can stand in braces"
        )
    known = list(parameters)
    if name not in known:
        near = did_you_mean(name, known, "{%s}") or f"; it has {', '.join(known) or 'none'}"
        raise InvalidKey(text, f"{{{name}}} is not a parameter of the loader{near}")


def _check_gaps(text: str, pieces: Sequence[Any]) -> None:
    for (_, before, *_), (literal, name, *_) in itertools.pairwise(pieces):
        if before is not None and name is not None and not literal:
            raise InvalidKey(text, f"something must stand before {{{name}}} to keep values apart")
