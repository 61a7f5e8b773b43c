"""What Django keeps in its cache, as JSON. Never pickle: who can write to Redis could run code in every app.

A value that JSON has no word for is `{"!": <its kind>, "v": <its parts>}`: the kinds are those of KINDS. A dict
of the app's own that has a `!`, or keys that are no text, is the kind `dict`.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import uuid
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any, NamedTuple

from django.http import HttpResponse
from django.template.response import SimpleTemplateResponse
from django.utils.safestring import SafeString

from stillroom.codec import Unencodable

MARK = "!"
RESPONSE = "HttpResponse"


class Kind(NamedTuple):
    """How values of one type are taken apart and put together again."""

    name: str
    type: type
    parts: Callable[[Any], Any]
    whole: Callable[[Any], Any]


def pack(value: Any) -> Any:
    """As JSON. Raises Unencodable for what is neither JSON nor one of KINDS."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is list:
        return [pack(one) for one in value]
    if type(value) is dict and MARK not in value and all(type(key) is str for key in value):
        return {key: pack(one) for key, one in value.items()}
    if isinstance(value, HttpResponse):  # of any kind: what is kept is what is sent
        return {MARK: RESPONSE, "v": _response_parts(value)}
    if kind := _BY_TYPE.get(type(value)):
        return {MARK: kind.name, "v": kind.parts(value)}
    raise Unencodable(_refusal(type(value)))


def _refusal(given: type) -> str:
    """Why a value of this type is not kept. A NamedTuple, say, would come back as a tuple."""
    base = next((one.__name__ for one in given.__mro__[1:] if one in _KEPT), None)
    if base:
        return f"{given.__name__}: it would come back as {base}; make it one before you store it"
    return f"{given.__name__}: the cache keeps JSON, {', '.join(_BY_NAME)}; not objects"


def unpack(value: Any) -> Any:
    """What pack was given."""
    if isinstance(value, list):
        return [unpack(one) for one in value]
    if not isinstance(value, dict):
        return value
    if MARK in value:
        return _BY_NAME[value[MARK]].whole(value["v"])
    return {key: unpack(one) for key, one in value.items()}


def _response_parts(response: HttpResponse) -> Any:
    """A whole response, as the cache middleware keeps them. One that is not rendered yet is refused."""
    if isinstance(response, SimpleTemplateResponse) and not response.is_rendered:
        raise Unencodable("a response that has not been rendered has no content to keep")
    return {
        "status": response.status_code,
        "reason": response.reason_phrase,
        "charset": response.charset,
        "headers": [list(item) for item in response.items()],
        "cookies": [morsel.OutputString() for morsel in response.cookies.values()],
        "content": base64.b64encode(response.content).decode(),
    }


def _response(parts: Any) -> HttpResponse:
    content = base64.b64decode(parts["content"])
    made = HttpResponse(content, status=parts["status"], charset=parts["charset"])
    made.reason_phrase = parts["reason"]
    del made.headers["Content-Type"]
    for name, value in parts["headers"]:
        made.headers[name] = value
    for text in parts["cookies"]:
        made.cookies.update(SimpleCookie(text))
    return made


def _pairs(value: dict[Any, Any]) -> Any:
    return [[pack(key), pack(one)] for key, one in value.items()]


def _list(value: Any) -> Any:
    return [pack(one) for one in value]


# By the exact type: a subclass would come back as what it is derived from.
KINDS = [
    Kind("tuple", tuple, _list, lambda parts: tuple(unpack(parts))),
    Kind("set", set, _list, lambda parts: set(unpack(parts))),
    Kind("frozenset", frozenset, _list, lambda parts: frozenset(unpack(parts))),
    Kind("dict", dict, _pairs, lambda parts: {unpack(key): unpack(one) for key, one in parts}),
    Kind("bytes", bytes, lambda b: base64.b64encode(b).decode(), base64.b64decode),
    Kind(
        "datetime", datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat
    ),
    Kind("date", datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    Kind("time", datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    Kind(
        "timedelta",
        datetime.timedelta,
        lambda delta: [delta.days, delta.seconds, delta.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
    Kind("Decimal", decimal.Decimal, str, decimal.Decimal),
    Kind("UUID", uuid.UUID, str, uuid.UUID),
    Kind("SafeString", SafeString, str.__str__, SafeString),
    Kind(RESPONSE, HttpResponse, _response_parts, _response),
]
_BY_NAME = {kind.name: kind for kind in KINDS}
_BY_TYPE = {kind.type: kind for kind in KINDS}
_KEPT = {*_BY_TYPE, str, int, float, list} - {HttpResponse}
