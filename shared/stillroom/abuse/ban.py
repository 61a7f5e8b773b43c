"""A ban as a person sees it, and as Redis holds it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.durations import LAST_MOMENT


@dataclass(frozen=True, slots=True)
class Ban:
    """One ban. Times are the server's clock, seconds since 1970.

    `subject`: an IPv4 address, an IPv6 client's prefix, or a network. `by`: "rule" or "operator"; `rule` is empty
    if an operator banned, and `reason` is the operator's. `level`: how many bans the subject had before.
    """

    subject: str
    by: str
    rule: str
    reason: str
    level: int
    since: float
    until: float


class _Record(BaseModel):
    """The fields of a ban's key."""

    model_config = ConfigDict(extra="ignore")

    by: str = ""
    rule: str = ""
    reason: str = ""
    level: int = Field(0, ge=0, le=10**15)
    since: float = Field(0.0, ge=0, le=LAST_MOMENT)
    until: float = Field(0.0, ge=0, le=LAST_MOMENT)


def read_ban(subject: str, until: float, text: bytes | None) -> Ban | None:
    """Return the ban in a key; None if it has ended. One written by hand may say nothing of itself.

    `until`: when it ends, as the index says.
    """
    if text is None:
        return None
    try:
        record = _Record.model_validate_json(text)
    except ValidationError:
        record = _Record(by="unknown", until=min(until, LAST_MOMENT))
    return Ban(subject, **record.model_dump())
