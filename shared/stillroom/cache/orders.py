"""Define the orders that apps give to workers. Pydantic checks them and refuses unknown fields.

An order is kept in Redis until it is done.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from stillroom.errors import StillroomError
from stillroom.keys import KEY_LIMIT
from stillroom.operation import Operation

# Outcomes of an ordered load that has been done: the value is stored, or `keep` of its loader refuses it.
LOADED, NOT_WANTED = "loaded", "not wanted"
OF_0_1 = b"o:"  # in front of an order that 0.1 wrote down, in the cache's list of work
Name = Annotated[str, Field(min_length=1, max_length=KEY_LIMIT)]


class Order(BaseModel):
    """One thing to do; `kind` is also the last part of its task's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[str]

    def carried_out_by(self, cache: Any) -> Operation[Any]:
        """Return the operation of the cache's body that does it. Raises whatever kept it from being done."""
        raise NotImplementedError


class InvalidateKeys(Order):
    """`stillroom.invalidate_keys`"""

    kind = "invalidate_keys"
    keys: list[Name] = Field(min_length=1, max_length=1_000)

    def carried_out_by(self, cache: Any) -> Operation[Any]:
        return (yield from cache.invalidate(*self.keys))


class InvalidateTags(Order):
    """`stillroom.invalidate_tags`"""

    kind = "invalidate_tags"
    tags: list[Name] = Field(min_length=1, max_length=100)
    soft: bool = False

    def carried_out_by(self, cache: Any) -> Operation[Any]:
        return (yield from cache.invalidate_by_tag(*self.tags, soft=self.soft))


class InvalidatePattern(Order):
    """`stillroom.invalidate_pattern`"""

    kind = "invalidate_pattern"
    pattern: Name

    def carried_out_by(self, cache: Any) -> Operation[Any]:
        return (yield from cache.invalidate_by_pattern(self.pattern))


class Load(Order):
    """Load a value, whether the one that is there is stale or not."""

    kind = "load"
    loader: str = Field(min_length=1, max_length=200)
    args: dict[str, Any]

    def carried_out_by(self, cache: Any) -> Operation[Any]:
        report = yield from cache.load(self)
        if report["outcome"] not in (LOADED, NOT_WANTED):
            raise NotDone(f"{self.loader} was called and its value not kept: {report['outcome']}")
        return report


class NotDone(StillroomError):
    """An order was tried and is not done."""


KINDS: dict[str, type[Order]] = {
    order.kind: order for order in (InvalidateKeys, InvalidateTags, InvalidatePattern, Load)
}


def to_member(order: Order) -> bytes:
    """Return the order as it waits in Redis: `<kind> <JSON>`, which is the same text for equal orders."""
    fields = order.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"{order.kind} {text}".encode()


def from_member(member: bytes) -> Order:
    """Return the order that waits as this. Raises ValueError (pydantic's are)."""
    kind, _, fields = member.decode().partition(" ")
    if kind not in KINDS:
        raise ValueError(f"no order is called {kind[:50]!r}; there are {', '.join(KINDS)}")
    return KINDS[kind].model_validate_json(fields)


def to_body(member: bytes) -> str:
    """Return the order as a dead letter has it: one JSON object."""
    kind, _, fields = member.decode(errors="replace").partition(" ")
    return f'{{"order": {json.dumps(kind)}, "fields": {fields or "{}"}}}'


def from_body(body: str) -> Order:
    """Return the order in a dead letter. Raises ValueError."""
    try:
        letter = json.loads(body)
        return from_member(f"{letter['order']} {json.dumps(letter['fields'])}".encode())
    except (KeyError, TypeError, RecursionError):
        raise ValueError("this dead letter holds no order") from None
