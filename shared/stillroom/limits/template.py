"""The template of a path, such as `/product/{id}`: what fits it, in time linear in the path's length. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import unquote

from stillroom.errors import InvalidLimit

_FIELD = re.compile(r"\{([^{}]*)\}")
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::([A-Za-z_][A-Za-z0-9_]*))?", re.ASCII)
_ANGLED = re.compile(r"<(?:[A-Za-z_]+(?:\([^)]*\))?:)?([A-Za-z_][A-Za-z0-9_]*)>")
_COLONED = re.compile(r":([A-Za-z_][A-Za-z0-9_]*)")
_FOREIGN = "<>*?#^$|\\()[]"  # signs of other people's templates and of regular expressions

# One part between slashes: the texts around its fields. ("login",) is the word itself, ("", "") any part,
# ("v", ".json") what begins and ends so, with at least one character between.
Part = tuple[str, ...]
REST = None  # any number of parts, none too
Parts = tuple[Part | None, ...]
Chunk = list[Part]
ANY = "\x01"  # stands for whatever a field takes: no template has it
DEEPEST = 32  # parts, more than a template has
# Both are an i to a regular expression that ignores case (Turkish, with a dot and without), and not to casefold().
_LIKE_I = {0x130: "i", 0x131: "i"}


class Template:
    """A path's template. `{name}` is one part of a path or a piece of one; `{name:path}` also spans slashes.

    A slash at the end means nothing. Raises InvalidLimit for what is no template, with what was meant.
    """

    __slots__ = ("_chunks", "_folded", "is_small", "parts", "text")

    def __init__(self, text: str) -> None:
        _check(text)
        self.text = text
        self.parts: Parts = tuple([_part(part, text) for part in text.split("/") if part])
        self._chunks = _chunks(self.parts)
        self._folded = [[_folded(part) for part in chunk] for chunk in self._chunks]
        self.is_small = self._folded == self._chunks  # it has no capitals

    def fits(self, path: str) -> bool:
        """Return whether a decoded path fits this template."""
        return _fit(self._chunks, _split(path))

    def fits_in_any_case(self, path: str) -> bool:
        """Return whether a decoded path fits this template if capitals and small letters are one."""
        return _fit(self._folded, _folded_parts(path))

    def extremes(self) -> list[list[str]]:
        """Return the shortest and the longest path that fit, as parts: what takes both takes whatever fits."""
        return [_sample(self.parts, rest) for rest in (0, DEEPEST)]

    def takes(self, paths: Sequence[Sequence[str]]) -> bool:
        """Return whether all these paths, as parts, fit."""
        return all(_fit(self._chunks, path) for path in paths)


def could_meet(one: Parts, other: Parts) -> bool:
    """Return whether there may be a path that fits both. Where that is hard to tell, the answer is yes."""
    if not one or not other:
        return all(part is REST for part in one or other)
    first, second = one[0], other[0]
    if first is REST:
        return could_meet(one[1:], other) or could_meet(one, other[1:])
    if second is REST:
        return could_meet(other, one)
    return _parts_could_meet(first, second) and could_meet(one[1:], other[1:])


def _sample(parts: Parts, rest: int) -> list[str]:
    """Return a path that fits these parts, as parts. `rest`: how many stand for each REST."""
    filled = [[ANY] * rest if part is REST else [ANY.join(part)] for part in parts]
    return [text for texts in filled for text in texts]


def _fit(chunks: Sequence[Chunk], path: Sequence[str]) -> bool:
    first, last = chunks[0], chunks[-1]
    if len(chunks) == 1:
        return len(first) == len(path) and _fit_at(first, path, 0)
    end = len(path) - len(last)
    if end < len(first) or not _fit_at(first, path, 0) or not _fit_at(last, path, end):
        return False
    at = len(first)
    for chunk in chunks[1:-1]:
        # The leftmost place is as good as any: the following parts have the most room then.
        at = _place_of(chunk, path, at, end)
        if at < 0:
            return False
        at += len(chunk)
    return True


def _place_of(chunk: Chunk, path: Sequence[str], at: int, end: int) -> int:
    """Return the leftmost place of these parts between two places; -1 if they are not there."""
    word = next((n for n, part in enumerate(chunk) if len(part) == 1), None)
    last = end - len(chunk)
    while at <= last:
        if word is not None:  # `index` finds a word much faster than this loop does
            try:
                at = path.index(chunk[word][0], at + word, last + word + 1) - word
            except ValueError:
                return -1
        if _fit_at(chunk, path, at):
            return at
        at += 1
    return -1


def _fit_at(chunk: Chunk, path: Sequence[str], at: int) -> bool:
    return all(_part_fits(part, path[at + n]) for n, part in enumerate(chunk))


def _part_fits(part: Part, text: str) -> bool:
    """Match a part by the leftmost place of each text between fields, so that nothing is tried twice."""
    first, last = part[0], part[-1]
    if len(part) == 1:
        return text == first
    if not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for literal in part[1:-1]:
        at = text.find(literal, at + 1, end)  # a field has at least one character
        if at < 0:
            return False
        at += len(literal)
    return at < end


def _parts_could_meet(one: Part, other: Part) -> bool:
    if len(one) == 1:
        return _part_fits(other, one[0])
    if len(other) == 1:
        return _part_fits(one, other[0])
    begins = one[0].startswith(other[0]) or other[0].startswith(one[0])
    return begins and (one[-1].endswith(other[-1]) or other[-1].endswith(one[-1]))


@lru_cache(8)  # all routes of a table are asked about one path
def _split(path: str) -> list[str]:
    """Return the parts of a path without the empty one after a final slash."""
    inner = path.removeprefix("/").rstrip("/")
    return inner.split("/") if inner else []


@lru_cache(8)
def _folded_parts(path: str) -> list[str]:
    return _split(_small(path))


def _small(text: str) -> str:
    """Return the text in small letters, as a regular expression reads it that ignores case."""
    return text.translate(_LIKE_I).casefold()


def _chunks(parts: Parts) -> list[Chunk]:
    """Return the parts between one REST and the next."""
    chunks: list[Chunk] = [[]]
    for part in parts:
        if part is REST:
            chunks.append([])
        else:
            chunks[-1].append(part)
    return chunks


def _folded(part: Part) -> Part:
    return tuple([_small(text) for text in part])


# Reading a template


def _check(text: object) -> None:
    if not isinstance(text, str) or not text.startswith("/"):
        raise InvalidLimit(text, "a template begins with /")
    if text.count("{") != text.count("}") or "{" in _FIELD.sub("", text):
        raise InvalidLimit(text, "its braces do not match")
    if meant := _meant(text):
        raise InvalidLimit(
            text, f"a field is written {{name}} or {{name:path}}; did you mean {meant}?"
        )
    bare = _FIELD.sub("", text)
    if foreign := next((sign for sign in bare if sign in _FOREIGN), None):
        written = f"%{ord(foreign):02X}"
        raise InvalidLimit(
            text, f"{foreign} has no meaning in a template; in a path it is written {written}"
        )
    names = [found.partition(":")[0] for found in _FIELD.findall(text)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidLimit(text, f"it has two fields called {twice}; no framework takes that")


def _meant(text: str) -> str | None:
    """Return the template translated from Flask's, Django's or Express's words, or None if it is in ours."""
    if _ANGLED.search(text):
        return _ANGLED.sub(lambda found: _field(found[1], "path:" in found[0]), text)
    parts = text.split("/")
    if not any(part.startswith(":") for part in parts):
        return None
    return "/".join([_COLONED.sub(r"{\1}", part) if part[:1] == ":" else part for part in parts])


def _field(name: str, spans: bool) -> str:
    return f"{{{name}:path}}" if spans else f"{{{name}}}"


def _part(part: str, template: str) -> Part | None:
    spans = [_spans(text, template) for text in _FIELD.findall(part)]
    if any(spans):
        if _FIELD.sub("", part) or len(spans) > 1:
            raise InvalidLimit(template, "a {…:path} stands alone between slashes")
        return REST
    return tuple([unquote(text) for text in _FIELD.split(part)[::2]])


def _spans(text: str, template: str) -> bool:
    """Return whether a field spans slashes."""
    match = _NAMED.fullmatch(text)
    if match is None or match[2] not in (None, "path"):
        meant = f"; did you mean {{{match[1]}}}?" if match else ""
        raise InvalidLimit(template, f"{{{text}}} is no field: {{name}} or {{name:path}}{meant}")
    return match[2] == "path"
