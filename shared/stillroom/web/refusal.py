"""Answers a request that is over its limits, in the app's own words if it has some. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stillroom.errors import InvalidLimit, in_code
from stillroom.limits.decision import Decision, headers_of
from stillroom.limits.routes import check_plain, told
from stillroom.misuse import name_of
from stillroom.web.headers import Header
from stillroom.web.problem import Answer, answer


class Refusal(NamedTuple):
    """A request that is refused: 429, or 503 where it may not be decided without Redis."""

    decision: Decision
    method: str
    path: str
    headers: Sequence[Header]  # of the request

    @property
    def status(self) -> int:
        """Return the status of the answer: 429 or 503."""
        return self.decision.status

    @property
    def retry_after(self) -> float | None:
        """Return seconds until it would be admitted. None: never."""
        return self.decision.retry_after

    @property
    def problem(self) -> dict[str, Any]:
        """Return the problem details, which are sent unless the app says something else (RFC 9457)."""
        return self.decision.problem()

    def header(self, name: str) -> str:
        """Return a header of the request, such as Accept; empty where there is none."""
        found = [value for given, value in self.headers if given.lower() == name.lower()]
        return ", ".join(found)


# An app's own body: (content type, body). None: problem+json after all. Status and headers are not its business.
Render = Callable[[Refusal], tuple[str, str | bytes] | None]


def refused(refusal: Refusal, said: Sequence[Decision], render: Render | None = None) -> Answer:
    """Return the answer. `said`: all that was decided about the request, the denial last."""
    headers = headers_of(said)
    rendered = told("render", render, refusal) if render else None
    if render is None or rendered is None:
        return answer(refusal.status, refusal.problem, headers, refusal.method)
    kind, body = _checked(rendered, render)
    raw = body.encode() if isinstance(body, str) else body
    written = {"Content-Type": kind, "Content-Length": str(len(raw)), "Cache-Control": "no-store"}
    written |= headers
    return Answer(refusal.status, list(written.items()), b"" if refusal.method == "HEAD" else raw)


def _checked(rendered: object, render: Render) -> tuple[str, str | bytes]:
    """Return what `render` returned. Raises InvalidLimit for what is no content type and body."""
    match rendered:
        case [str() as kind, str() | bytes() as body] if "/" in kind:
            return kind, body
    why = "render= returns (content type, body), as in ('text/plain', 'later'), or None"
    raise InvalidLimit(name_of(render), f"{why}; not {in_code(rendered):.100}")


def checked_render(render: object) -> Render | None:
    """Return the function. Raises InvalidLimit for what can't be called, or would have to be awaited."""
    if render is not None and not callable(render):
        raise InvalidLimit(render, "render= is a function: Refusal → (content type, body), or None")
    check_plain("render", render)
    return render
