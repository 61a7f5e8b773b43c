"""`{% load stillroom %}`: Django's `{% cache %}` with tags, and one renderer while others wait.

{% load stillroom %}
{% cache 300 sidebar user.language tags="products,menu" swr=600 %} … {% endcache %}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.core.cache import InvalidCacheBackendError, caches
from django.core.cache.utils import make_template_fragment_key
from django.template import Library, Node, TemplateSyntaxError
from django.utils.safestring import SafeString, mark_safe

from stillroom.web.django.cache import StillroomCache

register = Library()

OPTIONS = ("tags", "swr", "using")


class CacheNode(Node):
    """A cached fragment."""

    def __init__(
        self, nodelist: Any, timeout: Any, name: str, vary: Sequence[Any], options: dict[str, Any]
    ) -> None:
        self.nodelist = nodelist
        self._timeout = timeout
        self._name = name
        self._vary = vary
        self._options = options

    def render(self, context: Any) -> SafeString:
        key = make_template_fragment_key(self._name, [one.resolve(context) for one in self._vary])
        options = {name: value.resolve(context) for name, value in self._options.items()}
        timeout = self._timeout.resolve(context)
        text: str = _backend(options.pop("using", None)).get_or_set(
            key,
            lambda: str(self.nodelist.render(context)),
            None if timeout is None else _seconds(timeout, "timeout"),
            tags=_names(options.get("tags", ())),
            swr=_seconds(options.get("swr", 0), "swr"),
        )
        return mark_safe(text)


@register.tag("cache")  # type: ignore[untyped-decorator]
def do_cache(parser: Any, token: Any) -> CacheNode:
    """`{% cache timeout name [variable …] [tags=…] [swr=…] [using=…] %}`: as Django's own, and with tags.

    `tags` is a text with commas between, or a list. `swr`: seconds after the timeout in which it is served stale
    while one reader renders it again.
    """
    nodelist = parser.parse(("endcache",))
    parser.delete_first_token()
    words = token.split_contents()
    starts = tuple(f"{name}=" for name in OPTIONS)
    given = [word for word in words[1:] if not word.startswith(starts)]
    options = dict(word.split("=", 1) for word in words[1:] if word.startswith(starts))
    if len(given) < 2:
        raise TemplateSyntaxError(f"{words[0]!r} tag: a timeout in seconds and a name")
    return CacheNode(
        nodelist,
        parser.compile_filter(given[0]),
        given[1],
        [parser.compile_filter(one) for one in given[2:]],
        {name: parser.compile_filter(value) for name, value in options.items()},
    )


def _backend(using: Any) -> StillroomCache:
    try:
        backend = caches[using or "template_fragments"]
    except InvalidCacheBackendError as error:
        if using:
            raise TemplateSyntaxError(f"'cache' tag: there is no cache {using!r}") from error
        backend = caches["default"]
    if not isinstance(backend, StillroomCache):
        raise TemplateSyntaxError(
            f"'cache' tag: tags need a StillroomCache, not {type(backend).__name__}"
        )
    return backend


def _names(tags: Any) -> list[str]:
    if isinstance(tags, str):
        return [name for name in (part.strip() for part in tags.split(",")) if name]
    return [str(tag) for tag in tags or ()]


def _seconds(given: Any, name: str) -> int:
    try:
        return int(given)
    except (TypeError, ValueError):
        raise TemplateSyntaxError(f"'cache' tag: {name}={given!r} is no number") from None
