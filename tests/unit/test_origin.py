"""A request made by another site's page is recognized."""

from __future__ import annotations

import pytest

from stillroom import SettingsError
from stillroom.web.origin import SameOrigin, same_origin

HOST = "shop.example"
EVIL = "https://evil.example"


@pytest.mark.parametrize(
    ("site", "origin", "host", "is_refused"),
    [
        ("same-origin", "https://shop.example", HOST, False),
        ("none", "", HOST, False),
        ("cross-site", EVIL, HOST, True),
        ("cross-site", "", HOST, True),
        ("same-site", "https://blog.shop.example", HOST, True),
        ("cross-site", "https://shop.example", HOST, True),  # what the browser says goes before
        ("nonsense", "", HOST, True),
        ("", "", HOST, False),  # no browser of this decade
        ("", "https://shop.example", HOST, False),
        ("", "https://SHOP.example", HOST, False),
        ("", "http://shop.example", HOST, False),  # behind a proxy that ends TLS
        ("", "https://shop.example:8443", "shop.example:8443", False),
        ("", "http://127.0.0.1:8000", "127.0.0.1:8000", False),
        ("", "https://shop.example", "shop.example:443", False),
        ("", "https://shop.example", "shop.example:8443", True),
        ("", "https://shop.example:8443", HOST, True),
        ("", EVIL, HOST, True),
        ("", "null", HOST, True),
        ("", "https://shop.example.evil.example", HOST, True),
        ("", "https://shop.example@evil.example", HOST, True),
        ("", "https://[bad", HOST, True),
        ("", "https://shop.example:99999", HOST, True),
        ("", EVIL, "", True),
        ("", "moz-extension://shop.example", HOST, True),
    ],
)
def test_an_unsafe_request_is_refused_unless_it_is_the_visitors_own(
    site: str, origin: str, host: str, is_refused: bool
) -> None:
    """An unsafe request is refused unless it is the visitor's own, by Sec-Fetch-Site or else by Origin and Host."""
    guard = SameOrigin()
    for method in ("POST", "PUT", "PATCH", "DELETE", "PURGE"):
        assert guard.refuses(method, site, origin, host) is is_refused
    for method in ("GET", "HEAD", "OPTIONS"):
        assert not guard.refuses(method, site, origin, host)
    assert guard.is_foreign(site, origin, host) is is_refused


def test_an_origin_may_be_trusted() -> None:
    """A trusted origin is that origin only: not its http form, another port or a subdomain."""
    guard = same_origin(["https://app.example"])
    assert guard is not None
    assert not guard.refuses("POST", "cross-site", "https://app.example", HOST)
    for other in ("http://app.example", "https://app.example:444", "https://a.app.example", ""):
        assert guard.refuses("POST", "cross-site", other, HOST)


@pytest.mark.parametrize(
    ("trusted", "sent"),
    [
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("https://app.example:80", "https://app.example:80"),
        ("HTTPS://App.Example", "https://app.example"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://localhost:5173", "http://localhost:5173"),
    ],
)
def test_an_origin_is_known_as_browsers_write_it(trusted: str, sent: str) -> None:
    """A trusted origin with its scheme's own port, or with letters that browsers encode, is the one they send."""
    assert not SameOrigin([trusted]).refuses("POST", "cross-site", sent, HOST)


def test_a_mistake_is_told_when_the_middleware_is_made() -> None:
    """A text that is no origin, or in the place of a list, is refused when the middleware is made."""
    assert same_origin(False) is None
    for bad in (
        "app.example",
        "https://app.example/",
        "https://",
        "ftp://app.example",
        "https://[a",
        "https://*.example",
        "*",
        "null",
        "https://app.example ",
        "https://user@app.example",
        "https://app.example:x",
        "https://app.example?",
        "https://.example",
        "https://straße.example",  # Python takes it for strasse.example, which may be another's
        5,
        None,
    ):
        with pytest.raises(SettingsError, match="is no origin"):
            same_origin([bad])  # type: ignore[list-item]
    for no_list in ("https://app.example", None, 5):
        with pytest.raises(SettingsError, match="True, or a list"):
            same_origin(no_list)  # type: ignore[arg-type]
