"""A limit is a value, and a value that is no limit is refused."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from stillroom import API, AUTH, DEFAULT, STATIC, InvalidLimit, Limit
from stillroom.limits.changes import checked
from stillroom.limits.fields import policy_field


def test_the_presets_are_what_most_apps_need() -> None:
    """The presets have name, quota, window and behaviour without Redis as most apps need."""
    assert [
        (one.name, one.quota, one.window, one.away) for one in (DEFAULT, API, AUTH, STATIC)
    ] == [
        ("default", 100, 60, "local"),
        ("api", 1000, 3600, "local"),
        ("auth", 5, 300, "strict"),
        ("static", 1000, 60, "open"),
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": ""}, "a limit's name is 1 to 64 of"),
        ({"name": "a!b"}, "a limit's name is 1 to 64 of"),
        ({"name": "x" * 65}, "a limit's name is 1 to 64 of"),
        ({"name": 'a"b'}, "a limit's name is 1 to 64 of"),
        ({"quota": -1}, "quota is a whole number, 0 to 1,000,000 hits"),
        ({"quota": 1_000_001}, "quota is a whole number"),
        ({"quota": True}, "quota is a whole number"),
        ({"window": 0}, "window is a whole number, 1 to 31,622,400 seconds"),
        ({"window": 0.5}, "window is a whole number"),
        ({"by": "ip&"}, "kinds of subjects"),
        ({"by": "IP"}, "kinds of subjects"),
        ({"by": "a:b"}, "kinds of subjects"),
        ({"away": "opne"}, "local or open or strict; did you mean open?"),
    ],
)
def test_what_is_no_limit_is_said(fields: dict[str, Any], reason: str) -> None:
    """A value that is no limit is refused with the given and the allowed values."""
    with pytest.raises(InvalidLimit, match=reason.replace("?", r"\?")) as caught:
        Limit(**{"name": "x", "quota": 1, "window": 1} | fields)
    assert caught.value.given in fields.values()


def test_a_limit_may_be_named_by_an_enum() -> None:
    """A limit whose texts are members of a (str, Enum) has their values, in the header as well."""

    class Given(str, Enum):  # noqa: UP042 (as older code writes it)
        NAME, BY, AWAY = "exports", "user", "strict"

    limit = Limit(Given.NAME, 1, 1, by=Given.BY, away=Given.AWAY)
    assert {type(text) for text in (limit.name, limit.by, limit.away)} == {str}
    assert limit == Limit("exports", 1, 1, by="user", away="strict")
    assert policy_field((limit,)) == '"exports";q=1;w=1'
    assert type(checked(Given.NAME, 1, 1, 60).name) is str


def test_equal_limits_are_the_same_key() -> None:
    """Equal limits are the same key, because they are looked up on every request."""
    assert hash(Limit("default", 100, 60)) == hash(DEFAULT)
    assert Limit("default", 100, 60) == DEFAULT
    assert Limit("default", 99, 60) != DEFAULT


def test_a_quota_for_each_tenant_is_found_at_once() -> None:
    """A thousand limits of one name are found at once, because their hashes differ."""
    tenants = [Limit("tenant", quota, 60) for quota in range(500)]
    assert len(set(map(hash, tenants))) == 500
