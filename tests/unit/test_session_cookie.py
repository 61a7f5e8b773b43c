"""The session's cookie is read safely from any header, and written as browsers need it."""

from __future__ import annotations

import re
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json, to_json

from stillroom import SessionDataRefused, SettingsError
from stillroom.sessions import decoded_value, encoded_value
from stillroom.sessions.token import make_token
from stillroom.web import SessionCookie
from stillroom.web.fields import field_of, key_of, to_data, to_fields

COOKIE = SessionCookie()
TOKEN = make_token(7, b"\x01" * 32)
OTHER = make_token(8, b"\x02" * 32)


def test_it_is_found_among_others() -> None:
    """The cookie is found among others, whatever stands around it."""
    assert COOKIE.read(f"__Host-sid={TOKEN}") == TOKEN
    assert COOKIE.read(f'a=1; b="x;y"; __Host-sid={TOKEN} ; _ga=GA1.2; flag') == TOKEN
    assert COOKIE.read(f"lang=de;__Host-sid={TOKEN};") == TOKEN


@pytest.mark.parametrize(
    "header",
    [
        "",
        ";;;===",
        "__Host-sid",
        "__Host-sid=",
        f"__Host-sid={TOKEN[:-1]}",
        f"__Host-sid={TOKEN}x",
        f"__Host-sid={TOKEN}\n",
        f'__Host-sid="{TOKEN}"',
        f"__host-sid={TOKEN}",
        f"x__Host-sid={TOKEN}",
        f"__Host-sid2={TOKEN}",
        f"other={TOKEN}",
        f"other=__Host-sid={TOKEN}",
        f"__Host-sid={TOKEN}\x00",
        f"__Host-sid={'A' * 100_000}",
        "__Host-sid=" + "\u00e9" * 46,
        f"__Host-sid=ff.{TOKEN[3:]}".replace("ff.", "FF."),
    ],
)
def test_what_is_no_token_is_passed_over(header: str) -> None:
    """A text that is no token is ignored as if there were no cookie."""
    assert COOKIE.read(header) is None


def test_twice_the_same_is_one_and_two_are_none() -> None:
    """The same token twice is one. Two tokens are none, because one was planted; other text pushes none out."""
    assert COOKIE.read(f"__Host-sid={TOKEN}; __Host-sid={TOKEN}") == TOKEN
    assert COOKIE.read(f"__Host-sid={TOKEN}; __Host-sid={OTHER}") is None
    assert COOKIE.read(f"__Host-sid={OTHER}; __Host-sid={TOKEN}") is None
    assert COOKIE.read(f"__Host-sid=junk; __Host-sid={TOKEN}; __Host-sid=") == TOKEN


def test_two_tokens_of_a_browser_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A cookie of which browsers send two is logged once, with its likely cause: nobody with both can log in."""
    cookie = SessionCookie("told-once")
    for _ in range(3):
        assert cookie.read(f"told-once={TOKEN}; told-once={OTHER}") is None
    (record,) = caplog.records
    assert "told-once" in record.getMessage()
    assert "Give a cookie that is kept in another way another name" in record.getMessage()
    assert TOKEN not in record.getMessage()


@given(st.text(max_size=200))
def test_no_header_is_too_strange(header: str) -> None:
    """No header raises, and nothing but a token comes out of it."""
    assert COOKIE.read(header) is None
    assert COOKIE.read(f"{header};__Host-sid={TOKEN};{header}") == TOKEN


def test_it_is_written_for_https_and_this_host_alone() -> None:
    """The cookie is Secure, HttpOnly, SameSite=Lax, Path=/ and without Domain; its Max-Age is never 0."""
    assert COOKIE.write(TOKEN, 86_400.9) == (
        f"__Host-sid={TOKEN}; Max-Age=86400; Path=/; HttpOnly; SameSite=Lax; Secure"
    )
    assert "Max-Age=1;" in COOKIE.write(TOKEN, 0.2)
    assert COOKIE.clear() == "__Host-sid=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax; Secure"
    plain = SessionCookie("sid", secure=False, same_site="Strict")
    assert plain.write(TOKEN, 60) == (f"sid={TOKEN}; Max-Age=60; Path=/; HttpOnly; SameSite=Strict")


def test_what_browsers_know_more_of_can_be_said() -> None:
    """Domain, path, partition, browser lifetime and the newest prefix can be set."""
    wide = SessionCookie("__Secure-sid", domain="example.com", path="/shop", partitioned=True)
    assert wide.write(TOKEN, None) == (
        f"__Secure-sid={TOKEN}; Path=/shop; Domain=example.com; HttpOnly; SameSite=Lax; Secure; Partitioned"
    )
    assert wide.clear().startswith("__Secure-sid=; Max-Age=0; Path=/shop; Domain=example.com; ")
    http = SessionCookie("__Host-Http-sid")
    assert http.read(f"__Host-sid={OTHER}; __Host-Http-sid={TOKEN}") == TOKEN
    assert "HttpOnly" not in SessionCookie("sid", http_only=False).write(TOKEN, 1)


def test_nothing_but_a_token_gets_into_the_header() -> None:
    """Nothing but a token gets into the header, because a line break would be another header."""
    for bad in ("", "x", f"{TOKEN}\r\nSet-Cookie: a=b", f"{TOKEN}; Domain=evil.example"):
        with pytest.raises(ValueError, match="only a token"):
            COOKIE.write(bad, 60)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "a b"}, "name='a b'"),
        ({"name": "a\r\nb"}, "name="),
        ({"name": ""}, "name=''"),
        ({"same_site": "lax"}, "one of 'Lax', 'Strict', 'None'; did you mean 'Lax'?"),
        ({"same_site": None}, "one of 'Lax', 'Strict', 'None'; did you mean 'None'?"),
        ({"secure": False}, "__Host-"),
        ({"name": "sid", "secure": False, "same_site": "None"}, "same_site None"),
        ({"domain": "example.com"}, "__Secure- allows both"),
        ({"path": "/shop"}, "__Secure- allows both"),
        ({"name": "sid", "domain": "a b"}, "domain='a b'"),
        ({"name": "sid", "domain": "a;b"}, "domain="),
        ({"name": "sid", "path": "/a; Domain=evil.example"}, "path="),
        ({"name": "sid", "path": "a"}, "path='a'"),
        ({"name": "sid", "secure": False, "partitioned": True}, "partitioned"),
        ({"name": "__Host-Http-sid", "http_only": False}, "http_only=False"),
        ({"name": "__Http-sid", "http_only": False}, "http_only=False"),
        ({"same_site": "Laks"}, "did you mean 'Lax'?"),
    ],
)
def test_what_a_browser_would_refuse_is_refused_at_once(
    options: dict[str, object], said: str
) -> None:
    """A cookie that a browser would refuse raises at once with what is allowed."""
    with pytest.raises(SettingsError, match=re.escape(said)):
        SessionCookie(**options)  # type: ignore[arg-type]


@given(st.text(max_size=5))
def test_each_key_has_a_field_of_its_own(key: str) -> None:
    """Each key has a field of its own that the session takes, and is found back from it."""
    field = field_of(key)
    assert key_of(field) == key
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", field)
    assert field == key or field.startswith("x.")


def test_plain_keys_stay_as_they_are() -> None:
    """A plain key stays as it is, so that `redis-cli HGETALL` shows what the app wrote."""
    assert field_of("cart") == "cart"
    assert field_of("_auth_user_id") == "x._auth_user_id"
    assert field_of("x.y") == "x.x-2Ey"
    assert field_of("\u00e9") == "x.-C3-A9"


@pytest.mark.parametrize("key", [b"x", (1, 2), object()])
def test_a_key_that_json_can_t_write_is_refused(key: object) -> None:
    """A key that JSON cannot write is refused with the given and the allowed values."""
    with pytest.raises(SessionDataRefused, match="str, or a number"):
        field_of(key)


@given(st.dictionaries(st.text(max_size=200), st.integers(), max_size=8))
def test_any_text_is_a_key(data: dict[str, int]) -> None:
    """Any text is a key. A long one has a hash as its field and stands beside the value; no two share a field."""
    fields = to_fields(data, data)
    assert len(fields) == len(data)
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", field) for field in fields)
    assert to_data(from_json(to_json(fields))) == data


@pytest.mark.parametrize(
    ("key", "text"), [(7, "7"), (True, "true"), (None, "null"), (1.5, "1.5"), (-1, "-1")]
)
def test_a_key_that_is_no_text_is_what_json_makes_of_it(key: object, text: str) -> None:
    """A key that is no text becomes the text that JSON makes of it, as in Flask's and Django's sessions."""
    assert to_data(to_fields({key: 1}, [key])) == {text: 1}


def test_a_lone_surrogate_is_a_key_too() -> None:
    """A lone surrogate, which JSON cannot write, can be a key, short or long."""
    for key in ("\ud800", "\ud800" * 100):
        kept = {
            field: encoded_value(field, value)
            for field, value in to_fields({key: 1}, [key]).items()
        }
        assert to_data({field: decoded_value(text) for field, text in kept.items()}) == {key: 1}


def test_tokens_are_told_from_other_text_fast() -> None:
    """A thousand cookies in one header are read in one pass."""
    crowd = "; ".join(f"c{n}={secrets.token_urlsafe(8)}" for n in range(1_000))
    assert COOKIE.read(f"{crowd}; __Host-sid={TOKEN}; {crowd}") == TOKEN
