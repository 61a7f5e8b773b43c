"""A response as it is kept, and which responses may be kept. Pure."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from stillroom.cache.failures import OfOneCall
from stillroom.errors import StillroomError
from stillroom.web.headers import Header
from stillroom.web.pages.policy import Policy
from stillroom.web.problem import Answer

# Headers of the connection or of one delivery, and those that each answer gets anew: they are not stored.
NOT_KEPT = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "date",
    "server",
    "age",
    "content-length",
    "cache-status",
    "retry-after",
}
STATUSES = (200, 301, 308)  # of responses that may be kept
OF_LIMITS = ("ratelimit", "x-ratelimit")
PRIVATE = {"no-store", "private", "no-cache"}
POLICIES = {"content-security-policy", "content-security-policy-report-only"}
# CSP 3, section 7.1: a server generates a unique value each time it transmits a policy.
NONCE = "it has a nonce of its Content-Security-Policy, which belongs to one response"
# A clean request says neither, so what is kept is the answer to a request without them.
ALWAYS_ALLOWED = {"accept-encoding", "cookie", "authorization", "origin"}


class NotKept(StillroomError):
    """This response can't be shared; the message says why. It is rendered again for whoever asked."""


class OfOneRequest(NotKept, OfOneCall):
    """This response answers headers of its request that are in no page's key: the next one may well be kept."""


class RenderFailed(NotKept):
    """The app answered with 5xx (`response`): it is sent on where no stale page can be served instead."""

    def __init__(self, response: Answer) -> None:
        super().__init__(f"its status is {response.status}")
        self.response = response


@dataclass(frozen=True)
class StoredPage:
    """A response that many may be given. `text` is a body in UTF-8, `data` any other in base64."""

    status: int
    headers: list[tuple[str, str]]
    text: str | None
    data: str | None
    tags: list[str]

    @property
    def body(self) -> bytes:
        if self.text is not None:
            return self.text.encode()
        return base64.b64decode(self.data or "")

    def header(self, name: str) -> str | None:
        """Return all values of a header, as one."""
        found = [value for given, value in self.headers if given.lower() == name]
        return ", ".join(found) if found else None


def kept(
    policy: Policy, status: int, headers: Sequence[Header], body: bytes, tags: Sequence[str]
) -> StoredPage:
    """Return the response as it is stored. Raises NotKept."""
    if status >= 500:
        raise RenderFailed(Answer(status, list(headers), body))
    _check(policy, status, headers)
    mine = [(name.lower(), value) for name, value in headers if _is_kept(name.lower())]
    if not any(name == "etag" for name, _ in mine):
        mine.append(("etag", _etag(body, mine)))
    named = list(dict.fromkeys(tags))
    try:
        return StoredPage(status, mine, body.decode(), None, named)
    except UnicodeDecodeError:
        return StoredPage(status, mine, None, base64.b64encode(body).decode(), named)


def _check(policy: Policy, status: int, headers: Sequence[Header]) -> None:
    if status not in STATUSES:
        raise NotKept(f"its status is {status}")
    for name, value in headers:
        match name.lower():
            case "set-cookie":
                raise NotKept("it sets a cookie")
            case "cache-control" if said := _directives(value) & PRIVATE:
                raise NotKept(f"it says Cache-Control: {', '.join(sorted(said))}")
            case "vary":
                _check_vary(policy, value)
            case kind if kind in POLICIES and "'nonce-" in value.lower():
                raise NotKept(NONCE)


def _check_vary(policy: Policy, value: str) -> None:
    named = {name.strip().lower() for name in value.split(",")} - {""}
    if policy.sessions and named & {"cookie", "authorization"}:
        raise NotKept("it was made with a look at the session, and sessions=True says it is not")
    unknown = named - ALWAYS_ALLOWED - {name.lower() for name in policy.vary}
    if unknown:
        raise NotKept(f"it varies by {', '.join(sorted(unknown))}: name them in vary=[…]")


def _directives(value: str) -> set[str]:
    return {word.partition("=")[0].strip().lower() for word in value.split(",")}


def _is_kept(name: str) -> bool:
    return name not in NOT_KEPT and not name.startswith(OF_LIMITS)


def _etag(body: bytes, headers: Sequence[Header]) -> str:
    """Return a weak ETag, because compression on the way does not change the body's meaning."""
    kind = next((value for name, value in headers if name == "content-type"), "")
    digest = sha256(kind.encode() + b"\n" + body).digest()
    return f'W/"{base64.urlsafe_b64encode(digest[:16]).decode().rstrip("=")}"'
