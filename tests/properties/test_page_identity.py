"""Two requests share a page if and only if they agree in everything that was named."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.web.pages.answer import answer_from, is_not_modified
from stillroom.web.pages.policy import ANALYTICS, Identity, Policy, Visit, identify
from stillroom.web.pages.stored import StoredPage, kept

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
POLICY = Policy(query=["page", "sort"], vary=["Accept-Language"])
VISITS = st.builds(
    Visit,
    method=st.sampled_from(["GET", "HEAD"]),
    site=st.sampled_from(["https://a.example", "https://b.example/shop"]),
    path=st.builds("/{}".format, TEXT),
    query=st.builds(
        urlencode,
        st.lists(st.tuples(st.sampled_from(["page", "sort", "utm_source"]), TEXT), max_size=4),
    ),
    headers=st.dictionaries(
        st.sampled_from(["accept-language", "user-agent"]),
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=8),
    ),
)


def named(visit: Visit) -> Any:
    """Return all that may tell pages apart, as a model."""
    query = parse_qsl(visit.query, keep_blank_values=True)
    values = {name: [v for n, v in query if n == name] for name in ("page", "sort")}
    return visit.site, visit.path, values, visit.headers.get("accept-language")


@given(VISITS, VISITS)
def test_an_identity_is_what_was_named_and_no_more(one: Visit, other: Visit) -> None:
    """Identities are equal where all named parts are equal, and differ where one differs."""
    same = identify(one, POLICY, ANALYTICS) == identify(other, POLICY, ANALYTICS)
    assert same == (named(one) == named(other))


def test_names_may_be_given_once_or_as_a_set() -> None:
    """Names that an iterator gives count for each request, and those of a set have one order in all processes."""
    policy = Policy(query={"sort", "page"}, vary=iter(["Accept-Language"]), ignore=iter(["utm_*"]))  # type: ignore[arg-type]
    visit = Visit(
        "GET", "https://a.example", "/", "sort=1&utm_a=2&page=3", {"accept-language": "de"}
    )
    asked = [identify(visit, policy, ANALYTICS) for _ in range(2)]
    assert asked == [Identity("https://a.example", "/?page=3&sort=1", "accept-language=de")] * 2
    assert policy.varies_by == ["Accept-Language", "Cookie", "Authorization"]


@given(VISITS)
def test_a_clean_request_can_be_made_of_an_identity(visit: Visit) -> None:
    """A clean request made of an identity has the same address, parameters and headers."""
    identity = identify(visit, POLICY, ANALYTICS)
    assert isinstance(identity, Identity)
    path, _, query = identity.target.partition("?")
    assert unquote(path) == visit.path
    assert dict(parse_qsl(identity.vary, keep_blank_values=True)).get(
        "accept-language"
    ) == visit.headers.get("accept-language")
    assert sorted(parse_qsl(query, keep_blank_values=True)) == sorted(
        pair for pair in parse_qsl(visit.query, keep_blank_values=True) if pair[0] != "utm_source"
    )
    clean = Visit("GET", identity.site, unquote(path), query, {})
    again = identify(clean, Policy(query=POLICY.query), ANALYTICS)
    assert isinstance(again, Identity)
    assert again.target == identity.target


@pytest.mark.parametrize(
    "query", ["page=%FF", "page=1&page=%C3", "page=\xc3\xa9", "page=é", "%FF=1"]
)
def test_what_frameworks_read_in_two_ways_is_no_page(query: str) -> None:
    """A query of bytes that are no ASCII or no UTF-8 is left to the app, as frameworks read it differently."""
    visit = Visit("GET", "https://a.example", "/", query, {})
    assert identify(visit, POLICY, ANALYTICS) == "query"


@given(
    st.dictionaries(st.sampled_from(["cookie", "authorization"]), st.text(min_size=1, max_size=20)),
    st.booleans(),
)
def test_nobody_with_a_session_shares_a_page(headers: dict[str, str], sessions: bool) -> None:
    """A request with a session of any cookie name shares no page, unless the page is for everybody."""
    visit = Visit("GET", "https://a.example", "/", "", headers)
    identity = identify(visit, Policy(sessions=sessions), ["_ga"])
    names = [pair.partition("=")[0].strip() for pair in headers.get("cookie", "").split(";")]
    own = "authorization" in headers or any(name not in ("", "_ga") for name in names)
    assert (identity == "session") == (own and not sessions)


@given(st.binary(max_size=50), st.booleans())
def test_a_body_comes_back_as_it_was(body: bytes, is_head: bool) -> None:
    """A body, text or not, comes back with its length, and a client that has it is answered 304."""
    page: StoredPage = kept(POLICY, 200, [("Content-Type", "text/plain")], body, ["t", "t"])
    answer = answer_from(page, POLICY, "HEAD" if is_head else "GET", {}, [], "hit")
    assert answer.body == (b"" if is_head else body)
    headers = dict(answer.headers)
    assert headers["content-length"] == str(len(body))
    assert is_not_modified(page, {"if-none-match": headers["etag"]})
    assert not is_not_modified(page, {"if-none-match": '"x"'})
    assert page.tags == ["t"]
