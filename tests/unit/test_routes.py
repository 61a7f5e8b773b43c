"""No way to write a path escapes its limit in the route table."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom import API, AUTH, DEFAULT, STATIC, InvalidLimit, Limit, Route, Routes
from stillroom.limits.routes import below, resolved
from stillroom.limits.template import Template, could_meet
from tests.support.steps import steps_of

SEARCH = Limit("search", 3, 300)
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
        ("OPTIONS", "/product/7", "/product/{id}"),
        ("OPTIONS", "/upload", "/upload"),
        ("OPTIONS", "/login", "/{path:path}"),
        ("PURGE", "/health", "/health"),
        ("GET", "/", "/{path:path}"),
        ("GET", "/a\nb", "/{path:path}"),
    ],
)
def test_a_request_has_the_limits_of_its_template(method: str, path: str, template: str) -> None:
    """A request has the limits of the first route that fits; HEAD counts as GET, no methods means all."""
    assert TABLE.find(method, path).template == template


@pytest.mark.parametrize(
    ("in_front", "behind", "is_hidden"),
    [
        ("/{page}", "POST /login", True),
        ("GET /{page}", "POST /login", False),
        ("GET /{page}", "/login", False),
        ("/{path:path}", "/{page}", True),
        ("/{path:path}", "/", True),
        ("/{a}/{b}", "/{path:path}", False),
        ("/{a}/{path:path}", "/{path:path}", False),
        ("/a/{path:path}", "/a/{path:path}/b", True),
        ("/{page}", "/{page}.{kind}", True),
        ("/{page}.{kind}", "/{page}", False),
        ("/login", "/{page}", False),
        ("/login/", "/login", True),
        ("/Login", "/login", False),
    ],
)
def test_a_route_behind_one_that_takes_all_its_requests_is_never_reached(
    in_front: str, behind: str, is_hidden: bool
) -> None:
    """A route is unreached if one in front, with other limits, takes all its paths and methods."""
    routes = []
    for text, limit in ((in_front, API), (behind, AUTH), (behind, AUTH)):
        *methods, template = text.split()
        routes.append(Route(template, [limit], methods=methods))
    found = [(route.named, other.named) for route, other in Routes(routes).unreached()]
    assert found == ([(behind, in_front)] * 2 if is_hidden else [])


def test_what_no_route_names_has_the_default() -> None:
    """Paths without a route share one default bucket. A route may have no limits, and has its own cost."""
    assert TABLE.find("GET", "/else").limits == (DEFAULT,)
    assert TABLE.find("GET", "/health").limits == ()
    assert TABLE.find("GET", "/product/7").cost == 2
    assert Routes(default=[STATIC]).find("GET", "/x").limits == (STATIC,)


@pytest.mark.parametrize(
    "variant",
    [
        "/login/", "//login", "/./login", "/x/../login", "/%6cogin", "/%6Cogin", "/login?next=/", "/login#x",
        "/%2e/login", "/a/%2E%2e/login", "/login//", "/../login", "///./login/.", "login", "/%2flogin", "/login%2f",
        "/login\n", "/login \r\n", "/login\x00", "/login\x00.css", "/LOGIN", "/Login\n", "/lo\u017fin/../login",
        "/login;x=1", "/;v=1/login", "\\login", "/x/..\\login", "/login%0a", "/login%00", "/login%3F",
        "//login;a?b", "/login\u2028", "/login\x85", "/login\t", "/log\u0131n", "/LOG\u0130N",
    ],
)  # fmt: skip
def test_no_variant_of_a_path_escapes_its_limit(variant: str) -> None:
    """Every variant of a path that a server might read as a route is charged that route's limits."""
    assert AUTH in TABLE.find("POST", variant).limits
    assert AUTH in TABLE.find("post", variant).limits
    mounted = f"/app{variant}" if variant.startswith("/") else f"/app/{variant}"
    assert AUTH in TABLE.find("POST", below("/app", mounted), mounted).limits
    assert AUTH in TABLE.find("POST", mounted.removeprefix("/app"), mounted).limits


@pytest.mark.parametrize("path", ["junk/login", "x:junk/login", "junk%2flogin", "*//login"])
def test_a_path_without_a_slash_in_front_has_the_limits_of_what_follows(path: str) -> None:
    """A path without a slash in front is charged for what follows: dispatchers take its first part for a mount."""
    assert AUTH in TABLE.find("POST", path).limits


@pytest.mark.parametrize("path", ["/Login", "/login", "/LOGIN", "/log\u0131n"])
def test_a_template_with_capitals_is_charged_however_a_path_is_written(path: str) -> None:
    """A template with capitals is charged for a path in small letters, too: an app may ignore the case."""
    assert AUTH in Routes([Route("/Login", [AUTH])]).find("POST", path).limits


@pytest.mark.parametrize("path", ["http://shop/login", "HTTPS://shop//login?", "http:login"])
def test_an_absolute_uri_in_the_place_of_a_path_has_the_limits_of_its_path(path: str) -> None:
    """A request for an absolute URI, as proxies are sent, is charged the limits of the path in it."""
    assert AUTH in TABLE.find("POST", path).limits


def test_a_path_that_can_be_read_in_two_ways_is_charged_for_both() -> None:
    """A path that can be read as two routes is charged for both, so that neither is a way around."""
    table = Routes(
        [
            Route("/free", []),
            Route("/search/{words}", [SEARCH], cost=3),
            Route("/static/{path:path}", [STATIC]),
        ]
    )

    def names(path: str) -> set[str]:
        return {limit.name for limit in table.find("GET", path).limits}

    assert names("/search/?tea") == {"search"}
    assert names("/search/#tea") == {"search"}
    assert names("/search/a%2Fb") == {"search"}
    assert names("/other/../free") == {"default"}
    assert names("/static/../search/x") == {"static", "search"}
    assert table.find("GET", "/static/../search/x").cost == 3
    assert names("/other/../static/x") == {"default", "static"}
    assert names("/free") == set()
    assert names("/static/../unknown") == names("/static/..%2Funknown") == {"default", "static"}
    assert names("/static/..\\unknown") == {"default", "static"}
    assert names("/static/a..b/..c") == {"static"}


def test_of_two_limits_of_one_name_the_stricter_is_charged() -> None:
    """Of two limits with one name the stricter is charged, because they share a log."""
    table = Routes([Route("/a", [Limit("x", 10, 60)]), Route("/b/{p:path}", [Limit("x", 2, 60)])])
    assert table.find("GET", "/b/../a").limits == (Limit("x", 2, 60),)


@pytest.mark.parametrize(
    ("root", "path", "template"),
    [
        ("/api", "/api/login", "/login"),
        ("/api", "/login", "/login"),
        ("/api", "/api/login/", "/login"),
        ("/api", "/apis/login", "/{path:path}"),
        ("/api", "/api", "/{path:path}"),
        ("/api/", "/api/login", "/{path:path}"),
        ("/shop", "/shop/mounted", "/shop/mounted"),
    ],
)
def test_a_path_is_read_below_what_the_app_is_mounted_under(
    root: str, path: str, template: str
) -> None:
    """A path is found with or without the prefix that the app is mounted under."""
    table = Routes([Route("/login", [AUTH]), Route("/shop/mounted", [AUTH])])
    assert table.find("GET", below(root, path), path).template == template


def test_a_path_below_a_root_is_as_starlette_cuts_it() -> None:
    """A root is cut off as Starlette does: only between two parts of a path, and once."""
    assert below("/api", "/api/api/x") == "/api/x"
    assert below("/api", "/apix") == "/apix"
    assert below("", "/x") == "/x"


@settings(deadline=None)
@given(st.text(alphabet="/.%2eEfF5cClogin?#\x00é{};\\\n", max_size=40))
def test_any_path_has_limits(path: str) -> None:
    """Looking a path up never raises, and its resolved form can be read in one way only."""
    plain = resolved(path)
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
        ({"template": "/a/{id:int}"}, r"is no field.*did you mean {id}\?"),
        ({"template": "/a/<int:id>"}, r"did you mean /a/{id}\?"),
        ({"template": "/a/<path:rest>"}, r"did you mean /a/{rest:path}\?"),
        ({"template": "/a/<any(x, y):id>.html"}, r"did you mean /a/{id}.html\?"),
        ({"template": "/a/:id/b"}, r"did you mean /a/{id}/b\?"),
        ({"template": "/a/:id(\\d+)"}, r"did you mean /a/{id}"),
        ({"template": r"^/a/(?P<id>\d+)$"}, "begins with /"),
        ({"template": r"/a/(?P<id>\d+)$"}, "did you mean|has no meaning"),
        ({"template": "/a/*"}, "%2A"),
        ({"template": "/a?b={c}"}, "%3F"),
        ({"template": "/a/[id]"}, "%5B"),
        ({"template": "/a/{id}/{id}"}, "two fields called id"),
        ({"template": "/a/{id}-{id}"}, "two fields called id"),
        ({"template": "/a/{}"}, "is no field"),
        ({"template": "/a/x{p:path}"}, "stands alone"),
        ({"methods": ["get"]}, "in capitals"),
        ({"methods": ["HEAD"]}, "HEAD is found as GET"),
        ({"methods": ["WEBSOCKET"]}, "handshake of a websocket is found as GET"),
        ({"cost": -1}, "cost is a whole number"),
        ({"limits": ["api"]}, "a limit is a Limit"),
        ({"limits": API}, r"did you mean \[Limit"),
        ({"limits": "api"}, "limits are a list"),
        ({"count": "failure"}, r"did you mean failures\?"),
    ],
)
def test_what_is_no_route_is_said(fields: dict[str, Any], reason: str) -> None:
    """A bad route is refused when the table is made and not when a request comes."""
    with pytest.raises(InvalidLimit, match=reason):
        Route(**{"template": "/x", "limits": [AUTH]} | fields)


def test_literal_parts_are_no_patterns() -> None:
    """A literal part is no pattern: a dot is a dot, an escaped letter that letter, a final slash nothing."""
    table = Routes([Route("/a.b/", [AUTH]), Route("/c%41", [Limit("a", 1, 1)])])
    assert table.find("GET", "/a.b").limits == (AUTH,)
    assert table.find("GET", "/axb").limits == (DEFAULT,)
    assert table.find("GET", "/cA").limits[0].name == "a"


def test_a_table_holds_routes() -> None:
    """An entry of a table that is no route is refused when the table is made."""
    with pytest.raises(InvalidLimit, match="Routes holds Route"):
        Routes(["/login"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("template", "path", "fits"),
    [
        ("/{y}-{m}-{d}.html", "/2026-11-27.html", True),
        ("/{y}-{m}-{d}.html", "/2026-11.html", False),
        ("/{y}-{m}-{d}.html", "/-----.html", True),
        ("/{y}-{m}-{d}.html", "/----.html", False),
        ("/{a}{b}", "/x", False),
        ("/{a}{b}", "/xy", True),
        ("/a{x}a", "/a", False),
        ("/a{x}a", "/aa", False),
        ("/a{x}a", "/aaa", True),
        ("/{p:path}", "/", True),
        ("/{p:path}/z", "/z", True),
        ("/{p:path}/z", "/a/b/z", True),
        ("/{p:path}/z", "/a/b/z/c", False),
        ("/a/{p:path}/b/{q:path}/c", "/a/x/b/b/y/c", True),
        ("/a/{p:path}/b/{q:path}/c", "/a/b/c", True),
        ("/a/{p:path}/b/{q:path}/c", "/a/c", False),
        ("/{p:path}/a/a/{q:path}", "/a/x/a/a", True),
        ("/{p:path}/a/a", "/a/a/a", True),
        ("/a", "/a/", True),
        ("/a", "//a", False),
        ("/a/{x}", "/a//", False),
        ("/", "/", True),
        ("/", "", True),
    ],
)
def test_a_template_fits(template: str, path: str, fits: bool) -> None:
    """A field takes at least one character and a {…:path} any number of parts."""
    assert Template(template).fits(path) == fits


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["{%}", "a", "-", "b"]), min_size=1, max_size=6),
    st.text(alphabet="ab-", max_size=12),
)
def test_a_template_fits_what_its_regular_expression_would(parts: list[str], text: str) -> None:
    """A template finds all that its regular expression would, by the leftmost place of each literal."""
    template = "/" + "".join(part.replace("%", f"x{n}") for n, part in enumerate(parts))
    pattern = "".join("[^/]+" if part == "{%}" else re.escape(part) for part in parts)
    assert Template(template).fits(f"/{text}") == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    ("template", "piece"),
    [
        ("/{year}-{month}-{day}.html", "-"),
        ("/{a}{b}{c}{d}", "x"),
        ("/x{a}x{b}x{c}x{d}x", "x"),
        ("/{p:path}/a/b/{q:path}/c/{r:path}/d", "/a"),
        ("/{p:path}/a/a/a/{q:path}/a/a/b", "/a"),
        ("/{p:path}/{a}-{b}/{q:path}/{c}-{d}/z", "/-"),
        ("/login", "/.."),
        ("/login", "%25"),
        ("/login", ";a"),
        ("/login", "//"),
    ],
)
def test_matching_is_linear_in_the_length_of_a_path(template: str, piece: str) -> None:
    """Matching is linear: a path four times as long takes at most five times the steps."""
    table = Routes([Route(template, [AUTH])])
    few, many = (steps_of(lambda n=n: table.find("GET", "/" + piece * n)) for n in (1_000, 4_000))
    assert many <= 5 * few


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["x", "y", "x-{%}", "{%}", "{%:path}"]), min_size=1, max_size=7),
    st.lists(st.sampled_from(["x", "y", "z", "x-1"]), min_size=1, max_size=9),
)
def test_a_template_of_several_parts_fits_what_its_regular_expression_would(
    parts: list[str], path: list[str]
) -> None:
    """A template with fields that span slashes fits what its regular expression would."""
    template = "/" + "/".join(part.replace("%", f"f{n}") for n, part in enumerate(parts))
    each = {"{%:path}": "(?:/[^/]+)*", "{%}": "/[^/]+", "x-{%}": "/x-[^/]+"}
    pattern = "".join(each.get(part, f"/{part}") for part in parts)
    assert Template(template).fits("/" + "/".join(path)) == bool(
        re.fullmatch(pattern, "/" + "/".join(path))
    )


@pytest.mark.parametrize(
    "template", ["/{p:path}/edit/{q:path}", "/{p:path}/{a}/x-{b}/edit/{q:path}"]
)
def test_a_word_that_a_path_lacks_is_looked_for_at_once(template: str) -> None:
    """A word between fields that span slashes is found, or not, in as many steps in a path of any length."""
    form = Template(template)
    few, many = (steps_of(lambda n=n: form.fits("/a" * n)) for n in (10, 4_000))
    assert few == many


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("/login", "/login", True),
        ("/login", "/logout", False),
        ("/login", "/{name}", True),
        ("/a/{x}", "/a", False),
        ("/a/{x}.html", "/a/{y}.json", False),
        ("/a/v{x}", "/a/{y}1", True),
        ("/{p:path}", "/a/b", True),
        ("/a/{p:path}", "/b/{q:path}", False),
        ("/a/{p:path}/z", "/{q:path}/b/{r}", True),
    ],
)
def test_two_templates_could_meet(one: str, other: str, meet: bool) -> None:
    """Two templates are compared correctly: whether any path could fit both."""
    assert could_meet(Template(one).parts, Template(other).parts) == meet
    assert could_meet(Template(other).parts, Template(one).parts) == meet
