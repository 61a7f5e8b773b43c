"""Writes the values in Django's cache as JSON: the kinds of stillroom.marked, and whole responses.

It never uses pickle.
"""

from __future__ import annotations

import base64
import json
from http.cookies import SimpleCookie
from typing import Any

from django.http import HttpResponse
from django.template.response import SimpleTemplateResponse

from stillroom.codec import Unencodable
from stillroom.marked import EXACT, Marks, is_safe_text, kind, loses_its_zone

# By these attributes of a response decorators tell middlewares of Django and django-csp to leave a header out or to
# send another one.
FOR_MIDDLEWARE = (
    *("xframe_options_exempt", "_csp_config", "_csp_ro_config", "_csp_exempt", "_csp_exempt_ro"),
    *("_csp_update", "_csp_update_ro", "_csp_replace", "_csp_replace_ro"),
)


def pack(value: Any) -> Any:
    """Return the value as JSON. Raises Unencodable for what is neither JSON nor of a kind that is kept."""
    return _MARKS.pack(value)


def unpack(value: Any) -> Any:
    """Return what `pack` was given."""
    return _MARKS.unpack(value)


def _refused(value: Any) -> Unencodable | None:
    """Return why a value is not kept, or None if it is. A NamedTuple, for example, would come back as a tuple."""
    if loses_its_zone(value):
        name = type(value).__name__
        return Unencodable(f"{name}: it would lose its zone, which has no offset without a date")
    if type(value) in EXACT or isinstance(value, HttpResponse) or is_safe_text(value):
        return None
    name = type(value).__name__
    base = next((one.__name__ for one in type(value).__mro__[1:] if one in EXACT), None)
    if base:
        return Unencodable(f"{name}: it would come back as {base}; make it one before you store it")
    return Unencodable(f"{name}: the cache keeps JSON, {_MARKS.names}; not objects")


def _response_parts(response: HttpResponse) -> Any:
    """Return a whole response as the cache middleware keeps it. One that is not rendered yet is refused."""
    if isinstance(response, SimpleTemplateResponse) and not response.is_rendered:
        raise Unencodable("a response that has not been rendered has no content to keep")
    return {
        "status": response.status_code,
        "reason": response.reason_phrase,
        "charset": response.charset,
        "headers": [list(item) for item in response.items()],
        "cookies": [morsel.OutputString() for morsel in response.cookies.values()],
        "content": base64.b64encode(response.content).decode(),
        "marks": _marks_of(response),
    }


def _marks_of(response: HttpResponse) -> dict[str, Any]:
    """Return what decorators have noted for middlewares, as plain JSON: flags, and policies of texts."""
    noted = {name: getattr(response, name) for name in FOR_MIDDLEWARE if hasattr(response, name)}
    marks: dict[str, Any] = json.loads(json.dumps(noted, default=_plain))
    return marks


def _plain(value: Any) -> Any:
    """Return the sources of a policy as a list, and one that is lazy as a text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _response(parts: Any) -> HttpResponse:
    content = base64.b64decode(parts["content"])
    made = HttpResponse(content, status=parts["status"], charset=parts["charset"])
    made.reason_phrase = parts["reason"]
    del made.headers["Content-Type"]
    for name, value in parts["headers"]:
        made.headers[name] = value
    for text in parts["cookies"]:
        made.cookies.update(SimpleCookie(text))
    for name, value in parts.get("marks", {}).items():  # older releases wrote none
        setattr(made, name, value)
    return made


_MARKS = Marks([kind("HttpResponse", HttpResponse, _response_parts, _response)], refuse=_refused)
