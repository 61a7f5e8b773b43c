"""The route table: no way to write a path lets it escape its limit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom import API, AUTH, DEFAULT, STATIC, InvalidLimit, Limit, Route, Routes
from stillroom.limits.routes import normalized

TABLE = Routes(
    [
        Route("/login", [AUTH], ["POST"]),
        Route("/static/{path:path}", [STATIC]),
        Route("/product/{id}", [API], cost=2),
        Route("/product/{id}/v{n}.json", [API]),
        Route("/upload", [API], ["OPTIONS", "PUT"]),
        Route("/health", []),
    ]
)


@pytest.mark.parametrize(
    ("method", "path", "template"),
    [
        ("POST", "/login", "/login"),
        ("GET", "/login", "/{path:path}"),
        ("GET", "/product/7", "/product/{id}"),
        ("HEAD", "/product/7", "/product/{id}"),
        ("GET", "/product/7/8", "/{path:path}"),
        ("GET", "/product/", "/{path:path}"),
        ("GET", "/product/7/v12.json", "/product/{id}/v{n}.json"),
        ("GET", "/static/a/b/c.css", "/static/{path:path}"),
        ("GET", "/static", "/static/{path:path}"),
        ("GET", "/statics", "/{path:path}"),
        ("OPTIONS", "/product/7", "/{path:path}"),
        ("OPTIONS", "/upload", "/upload"),
        ("PURGE", "/health", "/health"),
        ("GET", "/", "/{path:path}"),
        ("GET", "/a\nb", "/{path:path}"),
    ],
)
def test_a_request_has_the_limits_of_its_template(method: str, path: str, template: str) -> None:
    """The first that fits; HEAD counts as GET, OPTIONS only where it is named, all else by default."""
    assert TABLE.find(method, path).template == template


def test_what_no_route_names_has_the_default() -> None:
    """One bucket for all of it; a route may have no limits at all, and costs what it says."""
    assert TABLE.find("GET", "/else").limits == (DEFAULT,)
    assert TABLE.find("GET", "/health").limits == ()
    assert TABLE.find("GET", "/product/7").cost == 2
    assert Routes(default=[STATIC]).find("GET", "/x").limits == (STATIC,)


@pytest.mark.parametrize(
    "variant",
    [
        "/login/", "//login", "/./login", "/x/../login", "/%6cogin", "/%6Cogin", "/login?next=/", "/login#x",
        "/%2e/login", "/a/%2E%2e/login", "/login//", "/../login", "///./login/.", "login", "/%2flogin", "/login%2f",
    ],
)  # fmt: skip
def test_no_variant_of_a_path_escapes_its_limit(variant: str) -> None:
    """Slashes, dots, escapes in either case."""
    assert TABLE.find("POST", variant).limits == (AUTH,)
    assert TABLE.find("post", variant).limits == (AUTH,)


@given(st.text(alphabet="/.%2eEfF5cClogin?#\x00é{}", max_size=40))
def test_any_path_has_one_spelling(path: str) -> None:
    """Normalizing never fails, and leaves nothing that could be read in another way."""
    plain = normalized(path)
    assert plain.startswith("/")
    assert "//" not in plain
    assert not {"..", "."} & set(plain.split("/"))
    assert TABLE.find("GET", path).limits is not None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"template": "login"}, "begins with /"),
        ({"template": 7}, "begins with /"),
        ({"template": "/a/{id"}, "braces do not match"),
        ({"template": "/a/}id{"}, "braces do not match"),
        ({"template": "/a/{id:int}"}, "is no field"),
        ({"template": "/a/{}"}, "is no field"),
        ({"template": "/a/x{p:path}"}, "stands alone"),
        ({"methods": ["get"]}, "in capitals"),
        ({"cost": -1}, "cost is a whole number"),
    ],
)
def test_what_is_no_route_is_said(fields: dict[str, Any], reason: str) -> None:
    """When the table is made, not when a request comes."""
    with pytest.raises(InvalidLimit, match=reason):
        Route(**{"template": "/x", "limits": [AUTH]} | fields)


def test_literal_parts_are_no_patterns() -> None:
    """A dot is a dot; an escaped letter is that letter; a slash at the end is none."""
    table = Routes([Route("/a.b/", [AUTH]), Route("/c%41", [Limit("a", 1, 1)])])
    assert table.find("GET", "/a.b").limits == (AUTH,)
    assert table.find("GET", "/axb").limits == (DEFAULT,)
    assert table.find("GET", "/cA").limits[0].name == "a"
