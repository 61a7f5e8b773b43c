"""`Pages`: whole responses of an app, cached with tags and refreshed by workers.

pages = Pages(room)
pages.install(app)                       # FastAPI, Starlette or Flask

@app.get("/products/{id}")
@pages.page(ttl=60, swr=600, tags=["products", "product:{id}"])
async def product(id: int): …
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from stillroom.cache.arguments import text_in_tag
from stillroom.cache.declared import declaring
from stillroom.cache.loaders import UNINSTALLED, Loaders, several
from stillroom.cache.template import Template, refuse_foreign
from stillroom.durations import Duration, seconds_of
from stillroom.errors import (
    InvalidArgument,
    InvalidKey,
    LoadFailed,
    SettingsError,
    did_you_mean,
    in_code,
)
from stillroom.integrations.model_tags import names_in
from stillroom.keys import sanitized
from stillroom.misuse import explained, name_of
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.web.pages.answer import answer_from, checked_cdn
from stillroom.web.pages.passes import Passes
from stillroom.web.pages.policy import (
    ANALYTICS,
    CAMPAIGNS,
    Identity,
    Policy,
    Visit,
    identify,
    listed,
)
from stillroom.web.pages.stored import NotKept, RenderFailed, StoredPage
from stillroom.web.pages.taken import taken_by
from stillroom.web.problem import Answer

log = logging.getLogger("stillroom.web")

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R", Stillroom, AsyncStillroom)

ATTRIBUTE = "__stillroom_page__"

# The tags that the view adds while it is rendered, and whether it was rendered for this request.
_tags: ContextVar[list[str] | None] = ContextVar("stillroom_page_tags", default=None)
_rendered: ContextVar[list[bool] | None] = ContextVar("stillroom_page_rendered", default=None)


def tag_page(*tags: str) -> None:
    """Give the page that is being rendered more tags; elsewhere this does nothing. Raises InvalidKey.

    A page with a tag that is too long, or no UTF-8, is given and not kept: a visitor may have searched for it.
    """
    for tag in tags:
        if not isinstance(tag, str) or not tag:
            sanitized(tag)
    if (known := _tags.get()) is not None:
        known.extend(tags)


class Marked(NamedTuple):
    """An endpoint whose responses are cached."""

    name: str
    origin: str  # where the endpoint is defined
    policy: Policy
    tags: PageTags
    times: Mapping[str, float]  # ttl and swr, where they were given
    load: Callable[..., Any]  # the cached function: (site, target, vary) → StoredPage


class Found(NamedTuple):
    """A request for such an endpoint: which page it is, or why it is not answered from the cache."""

    marked: Marked
    identity: Identity | str


class PageTags:
    """The tags of an endpoint's pages: texts, and templates of the parameters in its path and query."""

    def __init__(
        self, tags: Sequence[str], endpoint: Callable[..., Any], query: Sequence[str]
    ) -> None:
        parameters = inspect.signature(endpoint).parameters
        self._hints = _hints(endpoint)
        self._templates: list[Template] = []
        known = [*parameters, *query]
        takes_any = "request" in parameters or any(
            one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()
        )
        for tag in several("tags", tags):
            names = names_in(tag)
            refuse_foreign(tag, known, names)
            for name in names:
                if name not in known and not takes_any:
                    reason = f"{{{name}}} is no parameter of {name_of(endpoint)}"
                    raise InvalidKey(tag, reason + did_you_mean(name, known))
            self._templates.append(Template(tag, names, lambda _: text_in_tag, escapes=False))

    def of(self, parameters: Mapping[str, Any]) -> list[str]:
        """Return the tags of the page with these parameters. Raises NotKept where they do not fit."""
        return [
            template.fill({name: self._value(name, parameters) for name in template.names})
            for template in self._templates
        ]

    def unfilled_texts(self) -> list[str]:
        """Return the templates that have parameters."""
        return [template.text for template in self._templates if template.names]

    def _value(self, name: str, parameters: Mapping[str, Any]) -> Any:
        """Return the parameter as the endpoint gets it: `007` for an int is 7, as in the tags of a loader."""
        if name not in parameters:
            raise NotKept(f"it has no parameter {name}, which its tags need")
        hint = self._hints.get(name)
        if hint is None:
            return parameters[name]
        try:
            return hint.validate_python(parameters[name])
        except ValidationError as error:
            raise NotKept(
                f"its parameter {name} does not fit: {error.errors()[0]['type']}"
            ) from None


@explained
class Pages(Generic[R]):
    """Caches the responses of endpoints that `page` marks, for the room of an app.

    A page is rendered from a clean request: address, named query parameters, named headers, and nothing else. It is
    never given to a request with Authorization or a cookie, except for cookies that `harmless_cookies` names (those
    of analytics by default; globs), unless its endpoint says `sessions=True`. Other requests go to the endpoint as
    ever, and so does a response that may not be kept: another status, Set-Cookie, Cache-Control: private, a Vary
    that `vary` does not name.

    Each answer has an ETag and is 304 where the client has it already. `cdn` writes the page's tags for caches on
    the way: "Surrogate-Key", "Cache-Tag", "Cache-Groups".
    Redis away: each page is rendered.
    """

    def __init__(
        self, room: R, *, cdn: str | Sequence[str] = (), harmless_cookies: Sequence[str] = ANALYTICS
    ) -> None:
        if not isinstance(room, Stillroom | AsyncStillroom):
            raise InvalidArgument(
                f"Pages(room): a Stillroom or AsyncStillroom, not {in_code(room):.100}"
            )
        self.room: R = room
        self.cdn = checked_cdn(cdn)
        self._harmless = listed("harmless_cookies", harmless_cookies)
        self._marked: dict[str, Marked] = {}
        self._seen: set[str] = set()  # pages that an app has, or that were told as those of none
        self._passes = Passes()
        self.render: Callable[[Marked, Identity], Any] | None = None  # set by install

    @explained
    def page(
        self,
        *,
        ttl: Duration | None = None,
        swr: Duration | None = None,
        tags: Sequence[str] = (),
        query: Sequence[str] = (),
        ignore: Sequence[str] = CAMPAIGNS,
        vary: Sequence[str] = (),
        sessions: bool = False,
        max_age: Duration = 0,
        s_maxage: Duration | None = None,
        stale_while_revalidate: Duration | None = None,
        stale_if_error: Duration | None = None,
        name: str | None = None,
    ) -> Callable[[F], F]:
        """Cache the responses of this endpoint, a function, a class or its method `get`. Goes below the framework's
        own decorator.

        `ttl` and `swr`: seconds fresh, and stale while a worker renders it again (defaults: the room's settings).
        `tags`: texts, or templates of its parameters: `product:{id}`. A view adds more by `tag_page`.
        `query`: query parameters that belong to the page; a request with others is not cached, except for those
        that `ignore` names (globs). `vary`: request headers that the view looks at. `sessions=True`: the page is
        the same for everybody, so it is also given to requests with a session.
        `max_age`, `s_maxage`, `stale_while_revalidate`, `stale_if_error`: seconds for browsers and CDNs, which no
        invalidation reaches; by default they ask each time, and usually get a 304.
        `name` is what workers call it: keep it stable. Times may be timedeltas. Raises InvalidKey, ValueError.
        """
        policy = Policy(
            query=query,
            ignore=ignore,
            vary=vary,
            sessions=sessions,
            max_age=max_age,
            s_maxage=s_maxage,
            stale_while_revalidate=stale_while_revalidate,
            stale_if_error=stale_if_error,
        )
        times = {
            kind: seconds_of(kind, given, least=0)
            for kind, given in (("ttl", ttl), ("swr", swr))
            if given is not None
        }

        def mark(endpoint: F) -> F:
            is_bound = isinstance(endpoint, partial) or inspect.ismethod(endpoint)
            if is_bound or not callable(endpoint):
                raise InvalidArgument(
                    f"@pages.page(…) is put on a function or a class, not on {in_code(endpoint):.100}"
                )
            origin = _name_of(endpoint)
            known = self._own_name(name or origin, origin, times)
            load = self._load_of(known, origin, times)
            tagged = PageTags(tags, endpoint, policy.query)
            self.room.cache.loaders.know_tags_of_pages(tagged.unfilled_texts())
            marked = Marked(known, origin, policy, tagged, times, load)
            _tell_of_taken(known, endpoint, policy)
            self._marked[known] = marked
            setattr(endpoint, ATTRIBUTE, marked)
            return endpoint

        return mark

    def _own_name(self, name: str, origin: str, times: Mapping[str, float]) -> str:
        """Return a page's name. Of views that one function makes, those with other times have another one."""
        known = self._marked.get(name)
        if known is None or known.origin != origin or known.times == times:
            return name
        parts: list[str] = [f"{kind}{seconds:.15g}" for kind, seconds in times.items()]
        return ".".join([name, *(parts or ["default"])])

    def _load_of(self, name: str, origin: str, times: Mapping[str, float]) -> Callable[..., Any]:
        """Return the cached function of this page, made by the first call of an app's factory."""
        if (known := self._marked.get(name)) is not None and known.origin == origin:
            return known.load
        if f"page.{name}" in self.room.cache.loaders:
            raise InvalidArgument(
                f"this room has a page named {name!r} already; give this one name=…"
            )

        def render(site: str, target: str, vary: str) -> StoredPage:
            page: StoredPage = self._rendering()(self._marked[name], Identity(site, target, vary))
            return page

        async def render_async(site: str, target: str, vary: str) -> StoredPage:
            rendering = self._rendering()(self._marked[name], Identity(site, target, vary))
            page: StoredPage = await rendering
            return page

        key = f"page:{name}:{{vary}}:{{site}}:{{target}}"
        options: Any = {"tags": [_tags_of_page], "name": f"page.{name}", **times}
        register: Any = self.room.cache.cached(key, **options)
        made: Any = render_async if isinstance(self.room, AsyncStillroom) else render
        setattr(made, UNINSTALLED, lambda: self.render is None)
        load: Callable[..., Any] = register(made)
        return load

    def install(self, app: Any) -> None:
        """Answer this app's requests from the cache: FastAPI and Starlette (AsyncStillroom), Flask (Stillroom)."""
        if hasattr(app, "add_middleware") and hasattr(app, "router"):
            from stillroom.web.pages.asgi import install_asgi

            install_asgi(self, app)
        elif hasattr(app, "wsgi_app") and hasattr(app, "url_map"):
            from stillroom.web.pages.flask import install_flask

            install_flask(self, app)
        else:
            raise InvalidArgument(
                f"Pages.install(app): FastAPI, Starlette or Flask, not {type(app).__name__}"
            )

    # Called by middleware

    def tell_of_unreached(self, endpoints: Iterable[Any]) -> None:
        """Log which pages are cached nowhere, since no endpoint of the installed app has them.

        `endpoints`: those that answer GET. Called with the first request of each app: then it has all its routes.
        An app's factory may leave some out. What is told once, or was in an earlier app, is not told again.
        """
        self._seen.update(marked.name for marked in map(_mark_of, endpoints) if marked is not None)
        for name in [one for one in self._marked if one not in self._seen]:
            self._seen.add(name)
            log.warning(
                "the page %s is cached nowhere: the app of Pages.install(app) has no route of its own that answers "
                "GET with it. An app that is mounted in it needs Pages of its own",
                name,
            )

    def find(self, endpoint: Any, visit: Visit) -> Found | None:
        """Return which page this request is for; None if the endpoint is not marked."""
        marked = _mark_of(endpoint)
        if marked is None:
            return None
        identity = identify(visit, marked.policy, self._harmless)
        if isinstance(identity, Identity) and (marked.name, identity) in self._passes:
            return Found(marked, "not kept")
        return Found(marked, identity)

    def answer(self, found: Found, visit: Visit, page: StoredPage, *, is_new: bool) -> Answer:
        status = "fwd=miss; stored" if is_new else "hit"
        return answer_from(page, found.marked.policy, visit.method, visit.headers, self.cdn, status)

    def failure(self, failed: RenderFailed, visit: Visit) -> Answer:
        """Return the app's own answer with 5xx. The view is not called a second time for it."""
        app: Answer = failed.response
        said = [*app.headers, ("cache-status", "stillroom; fwd=miss")]
        return Answer(app.status, said, b"" if visit.method == "HEAD" else app.body)

    def remember_pass(self, found: Found, reason: NotKept | LoadFailed) -> None:
        """Remember that this page can't be kept: for a while nobody tries, or waits for one who does."""
        page = found.marked.name, found.identity
        self._passes.add(page, found.marked.name, reason, self.room.stats)

    def _rendering(self) -> Callable[[Marked, Identity], Any]:
        if (rendered := _rendered.get()) is not None:
            rendered.append(True)
        if self.render is None:
            raise SettingsError("Pages.install(app) was not called: nobody can render its pages")
        return self.render


class Rendering:
    """The time in which a page is rendered: collects the tags that its view adds."""

    def __enter__(self) -> list[str]:
        tags: list[str] = []
        self._token = _tags.set(tags)
        return tags

    def __exit__(self, *_: object) -> None:
        _tags.reset(self._token)


class Asking:
    """The time in which a page is asked for: tells whether it had to be rendered for it."""

    def __enter__(self) -> list[bool]:
        rendered: list[bool] = []
        self._token = _rendered.set(rendered)
        return rendered

    def __exit__(self, *_: object) -> None:
        _rendered.reset(self._token)


def all_tags(own: Sequence[str], added: Sequence[str], loaders: Loaders) -> list[str]:
    """Return the tags of a page: its own, and those that its view added. Raises InvalidKey for a template.

    What a visitor asks for may have braces, so a view may add what one of the page's own tags is filled to.
    """
    loaders.refuse_unfilled(*(tag for tag in added if tag not in own))
    return [*own, *added]


def tell_of_late(marked: Marked, error: Exception) -> None:
    """Log what was raised behind a whole response, as by a background task: a server has sent that by then."""
    log.error("the page %s was rendered, and then its app raised", marked.name, exc_info=error)


def own_mark(endpoint: Any, marked: Marked) -> Marked:
    """Return the mark of the endpoint that a page's address leads to: of several views that one function makes, the
    one that is meant. Raises NotKept where it leads to another page, or to none."""
    own = _mark_of(endpoint)
    if own is None or own.name != marked.name:
        raise NotKept("its address leads to another endpoint")
    return own


def _mark_of(endpoint: Any) -> Marked | None:
    """Return the mark of an endpoint, or of the class that it was made of, or of what answers GET in that class."""
    kind = endpoint if isinstance(endpoint, type) else getattr(endpoint, "view_class", None)
    carriers = [endpoint] if kind is endpoint or kind is None else [endpoint, kind]
    if kind is not None:
        carriers += [getattr(kind, name, None) for name in ("get", "dispatch_request")]
    found = (getattr(one, ATTRIBUTE, None) for one in carriers)
    return next(filter(None, found), None)


def _tell_of_taken(name: str, view: Callable[..., Any], policy: Policy) -> None:
    """Log which headers and cookies a view takes that its pages are rendered without, though all visitors get them.

    Requests with a cookie, or with Authorization, go past the cache unless the endpoint says `sessions=True`.
    A page is rendered with the host of its address.
    """
    known = [("header", header.lower()) for header in ("host", *policy.vary)]
    for kind, taken in dict.fromkeys(taken_by(view)):
        is_own = kind == "cookie" or taken.lower() == "authorization"
        if (kind, taken.lower()) in known or (is_own and not policy.sessions):
            continue
        todo = "" if is_own else f". If it matters, name it: vary=[{taken!r}]"
        log.warning(
            "the view of the page %s takes the %s %s, and is called without it for all visitors%s",
            *(name, kind, taken, todo),
        )


def _tags_of_page(page: Any) -> Iterable[str]:
    tags: Iterable[str] = page.tags
    return tags


def _name_of(endpoint: Any) -> str:
    path = f"{endpoint.__module__}.{getattr(endpoint, '__qualname__', type(endpoint).__name__)}"
    return re.sub(r"[^\w.:-]", "", path.replace("<locals>.", ""), flags=re.ASCII)[-180:]


def _hints(endpoint: Any) -> dict[str, TypeAdapter[Any]]:
    """Return the types of an endpoint's parameters that a path can be read as."""
    try:
        hints = get_type_hints(declaring(endpoint))
    except NameError:
        return {}
    hints.pop("return", None)
    plain = {name: hint for name, hint in hints.items() if hint in _PLAIN}
    return {name: TypeAdapter(hint) for name, hint in plain.items()}


_PLAIN = (int, float, bool, UUID)
