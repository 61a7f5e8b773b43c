"""The part of `stillroom check` that looks at limits: those of tables, those of views, and who names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from stillroom.abuse.rules import BUILT_IN, Rule
from stillroom.cache.cached import UNCACHED
from stillroom.cli.application import endpoints_in, tables_in
from stillroom.cli.doctor import Line
from stillroom.errors import did_you_mean
from stillroom.limits import AUTH, Limit, Route, Routes
from stillroom.limits.changes import Change
from stillroom.shown import plural
from stillroom.web.carriers import LOST, UNASKED, charges, default_of, looking, lost_views
from stillroom.web.known_routes import Known, misfits

LOOKING = f"has {AUTH.name} on GET: who looks at the form uses up the tries of a login. Write"
CHARGERS = (
    "Flask needs StillroomLimits(app, room), Django LimitsMiddleware, Starlette StillroomMiddleware"
)


class InApp(NamedTuple):
    """Hold what an app's modules say of limits."""

    tables: dict[str, Routes]
    apps: list[tuple[str, Any, list[Known]]]

    @property
    def names_all(self) -> bool:
        """Return whether all limits can be seen: there are some, and no function of the request returns others."""
        carried = [one for *_, routes in self.apps for known in routes for one in known.carries]
        return all(one.limits is not None for one in carried) and any(self.limits())

    def limits(self) -> Iterator[tuple[str, Limit]]:
        """Yield all limits that can be seen, each with where it stands, and by what it counts there."""
        for name, table in self.tables.items():
            for route in (*table.routes, table.default):
                yield from [(f"routes {name}", limit) for limit in route.limits]
        for name, app, routes in self.apps:
            yield from [(f"views {name}", limit) for limit in default_of(app)]
            for known in routes:
                for one in known.carries:
                    limits = [replace(limit, by=one.by(limit)) for limit in one.limits or ()]
                    yield from [(f"views {name}", limit) for limit in limits]


def in_app(found: Sequence[tuple[str, Any]]) -> InApp:
    """Return what modules say of limits. `found`: what is in them, by its name."""
    return InApp(tables_in(found), endpoints_in(found))


def examined(app: InApp) -> Iterator[Line]:
    """Yield what is right and wrong, as far as the app's modules tell."""
    for name, table in app.tables.items():
        yield from _table(f"routes {name}", table)
        for _, one, _ in app.apps:
            for route, hint in misfits(table, one):
                said = f"{route} fits no endpoint of the app: its limits hold for nothing{hint}."
                yield Line("warn", f"routes {name}", said)
    for name, one, routes in app.apps:
        lost = [(view, why) for why in (LOST, UNASKED, UNCACHED) for view in lost_views(one, why)]
        lost += [(known.endpoint.name, known.endpoint.lost) for known in routes]
        yield from [Line("warn", f"views {name}", f"{view} {why}.") for view, why in lost if why]
        yield from _views(f"views {name}", one, [known for known in routes if known.carries])
    yield from _at_odds(app.limits())
    said = ", ".join(f"{name} ({len(table.routes)})" for name, table in app.tables.items())
    yield Line("pass", "routes", said or "no table of limits is in these modules")


def unknown_names(
    app: InApp, rules: Iterable[Rule], changes: Iterable[Change], used: Iterable[str]
) -> Iterator[Line]:
    """Yield the rules and changes that name a limit which nobody has. `used`: what processes have reported."""
    known = {limit.name for _, limit in app.limits()} | set(used)
    named = [("limits", f"{one.name} is changed", one.name) for one in changes]
    named += [
        (f"rule {rule.name}", f"it counts denials by {name}", name)
        for rule in rules
        for name in _denied_by(rule)
    ]
    for about, said, name in named if app.names_all else ():
        if name not in known:
            hint = did_you_mean(name, known)
            yield Line("warn", about, f"{said}, and nothing has a limit of this name{hint}.")


def _table(about: str, table: Routes) -> Iterator[Line]:
    for route, other in table.unreached():
        said = f"{route.named} is never reached: {other.named} comes first. Put it in front."
        yield Line("warn", about, said)
    for route in table.routes:
        if _counts_looking(route):
            said = f"{route.template} {LOOKING} methods=['POST'], or count='failures'."
            yield Line("warn", about, said)


def _counts_looking(route: Route) -> bool:
    names = {limit.name for limit in route.limits}
    return AUTH.name in names and route.takes("GET") and route.count == "all"


def _views(about: str, app: Any, limited: Sequence[Known]) -> Iterator[Line]:
    if limited and not charges(app):
        said = f"{limited[0].text} carries limits, and nothing in the app charges them: {CHARGERS}."
        yield Line("fail", about, said)
    for known in limited:
        if any(looking(one, AUTH.name) for one in known.carries):
            said = f"{known.text} {LOOKING} count='failures', or put it on the view of POST alone."
            yield Line("warn", about, said)
    if limited:
        yield Line("pass", about, f"{plural(len(limited), 'view')} with limits")


def _at_odds(limits: Iterable[tuple[str, Limit]]) -> Iterator[Line]:
    known: dict[str, Limit] = {}
    told: set[Limit] = set()
    for about, limit in limits:
        other = known.setdefault(limit.name, limit)
        if (other.quota, other.window) != (limit.quota, limit.window) and limit not in told:
            told.add(limit)
            said = f"{limit.name} is {other.quota}/{other.window} s here and {limit.quota}/{limit.window} s there."
            yield Line("warn", about, f"{said} Two limits need two names: they share a log.")


def _denied_by(rule: Rule) -> Iterator[str]:
    """Yield the limits that an operator's rule names. The built-in ones name what an app may have."""
    built_in = BUILT_IN.get(rule.name, {}).get("each", {})
    for key in rule.each:
        if key not in built_in and ":" in key:
            yield key.partition(":")[2]
