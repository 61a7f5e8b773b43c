"""Makes docs/reference from the code, so that nothing is said twice. `make docs` calls it; it needs no Redis.

Each function returns one page. What a page says stands in a docstring, a field or a table of the library.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import stillroom
from stillroom import Settings, errors, keys
from stillroom import cli as command_line
from stillroom.abuse.allowance import EVENTS_A_SECOND
from stillroom.cache import orders
from stillroom.cache.memo import LIMIT as MEMO_LIMIT
from stillroom.cache.ordering import ORDERS_LIMIT, TRIES_LIMIT
from stillroom.dead_letters import KEPT_S, LETTERS_LIMIT
from stillroom.dispatch import REFRESH_MANY_TASK, REFRESH_TASK, RefreshOrder, RefreshOrders
from stillroom.environment import SECRETS
from stillroom.health import advice, metrics
from stillroom.health.findings import OTHERS
from stillroom.health.report import Report
from stillroom.keys import EVENTS_KEPT
from stillroom.limits.changes import LONGEST_S, MOST
from stillroom.limits.denials import REMEMBERED_S
from stillroom.limits.limit import QUOTA_LIMIT, WINDOW_LIMIT
from stillroom.limits.log import SLICES
from stillroom.locks.body import WAITERS
from stillroom.setting_types import PEPPER_LEAST
from stillroom.settings import environment_names
from stillroom_workers import app as celery
from stillroom_workers.schedule import SCHEDULE

GLOBS_KEPT = int(
    re.findall(r"GLOBS_LIMIT = (\d+)", (files("stillroom") / "lua/mark.lua").read_text())[0]
)
MADE = "% Made by docs/reference.py.\n\n"


def write(folder: Path) -> None:
    """Write all pages; a page that has not changed is left alone, so that Sphinx need not read it again."""
    folder.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        path, text = folder / f"{name}.md", MADE + page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# Settings


def settings() -> str:
    """Every setting: name, unit and meaning from its docstring, default, range."""
    names, says = environment_names(), docstrings_of_fields(Settings)
    rows = {
        name: (
            f"`{names[name]}`" + (f", `{SECRETS[name]}_FILE`" if name in SECRETS else ""),
            f"`{name}`",
            _default(field),
            _range(field),
            says[name],
        )
        for name, field in Settings.model_fields.items()
    }
    head = ("Variable", "In Python", "Default", "Allowed", "Meaning")
    tables = [
        f"## {title}\n\n{_table(head, [rows[name] for name in some])}"
        for title, some in groups_of_fields(Settings).items()
    ]
    return (
        "# Settings\n\n"
        "Settings come from the environment, or from `Settings(name=…)` in Python. They are read once, "
        "when the room is made. A name that is unknown, a value of the wrong type or out of its range "
        "raises `SettingsError` then: the message says which setting, what was given, what is allowed and "
        "what was probably meant. A secret may come from a file, whose path stands in the variable with "
        "`_FILE`.\n\n"
        "Times are seconds and sizes are bytes unless the text says otherwise. Several values are separated by "
        "commas or spaces.\n\n" + "\n".join(tables)
    )


def groups_of_fields(model: type) -> dict[str, list[str]]:
    """Return the fields of a class by the comment above them, up to its first full stop or colon."""
    found: dict[str, list[str]] = {}
    for line in inspect.getsource(model).splitlines():
        if title := re.match(r" {4}# ([A-Z][^.:]+)[.:]", line):
            found[title[1]] = []
        elif (field := re.match(r" {4}([a-z]\w*): ", line)) and found:
            found[[*found][-1]].append(field[1])
    return {title: fields for title, fields in found.items() if fields}


def docstrings_of_fields(model: type) -> dict[str, str]:
    """The docstring below each attribute of a class, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(said))):
                found[name] = _line(said)
    return found


def _default(field: FieldInfo) -> str:
    value = field.default
    if value in (None, (), ""):
        return "none"
    if isinstance(value, tuple):
        return "`" + " ".join(map(str, value)) + "`"
    is_whole = isinstance(value, float) and value.is_integer()
    return f"`{int(value) if is_whole else value}`"


def _range(field: FieldInfo) -> str:
    if field.annotation is bool:
        return "`0` or `1`"
    if words := [word for word in get_args(field.annotation) if isinstance(word, str)]:
        return ", ".join(f"`{word}`" for word in words)
    # Of two bounds of a kind the last one holds.
    parts = [*get_args(field.annotation), *field.metadata]
    bounds = dict(bound for part in parts for bound in _bounds(part))
    return ", ".join(f"{sign} {bound}".strip() for sign, bound in bounds.items())


def _bounds(part: Any) -> Iterator[tuple[str, str]]:
    """A constraint of pydantic's as a sign and a number; one inside an Annotated is looked into."""
    for inner in getattr(part, "__metadata__", getattr(part, "metadata", ())):
        yield from _bounds(inner)
    for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if (bound := getattr(part, name, None)) is not None:
            yield sign, f"{bound:,}"
    if pattern := getattr(part, "pattern", None):
        yield "", f"`{pattern}`"


# Errors


def error_pages() -> str:
    """Every error, what it means and what to answer: its docstring."""
    parts = [
        f"## {error.__name__}\n\n{_derived(error)}\n\n{_prose(error).replace('Answer:', '*Answer:*')}\n"
        for error in all_errors()
    ]
    return (
        "# Errors\n\n"
        "All errors that Stillroom raises on purpose are `StillroomError`. Each has a sentence, and data "
        "that a caller may act on. *Answer* says what a web app does with it.\n\n"
        + "\n".join(parts)
    )


def all_errors() -> list[type[errors.StillroomError]]:
    """The errors of errors.py in their order, then those of other modules that have a public name."""
    named = [getattr(stillroom, name) for name in stillroom.__all__]
    kinds = [thing for thing in [*vars(errors).values(), *named] if inspect.isclass(thing)]
    return [kind for kind in dict.fromkeys(kinds) if issubclass(kind, errors.StillroomError)]


def _derived(error: type) -> str:
    where = "stillroom" if error.__name__ in stillroom.__all__ else error.__module__
    bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
    return f"`from {where} import {error.__name__}`, derived from {bases}."


# Tasks

SEND = """client.send_task(
    "stillroom.invalidate_tags", kwargs={"tags": ["products"]}, queue="stillroom.maintenance"
)"""


def tasks() -> str:
    """Every task by its name, for any Celery client."""
    rows = [
        (
            f"`{name}`",
            f"`{celery.queue_of(name)}`",
            _fields(name),
            _when(name),
        )
        for name in sorted(celery.tasks)
        if name.startswith("stillroom.")
    ]
    return (
        "# Tasks\n\n"
        "Any Celery client may send these by name, with named arguments, as JSON:\n\n"
        f"```python\n{SEND}\n```\n\n"
        "Arguments are checked. An order with unknown or missing ones is refused, and the refusal is the "
        "task's result. Every task may run twice, late, or in another order.\n\n"
        + _table(("Task", "Queue", "Arguments", "Sent by beat"), rows)
        + "\n## What beat does\n\n"
        + _table(("Tick", "Every", "Why"), [(t.name, f"{t.every:g} s", t.why) for t in SCHEDULE])
    )


def _fields(task: str) -> str:
    model = ORDERS.get(task)
    fields = model.model_json_schema()["properties"] if model else {}
    return "; ".join(f"`{name}`: {_kind(schema)}" for name, schema in fields.items()) or "none"


def _kind(schema: Mapping[str, Any]) -> str:
    """A field's JSON type, with its bounds."""
    inner = schema.get("items", {})
    least, most = schema.get("minItems"), schema.get("maxItems")
    of = f" of {inner.get('type', 'orders')}, {least} to {most:,}" if most else ""
    default = f", default {json.dumps(schema['default'])}" if "default" in schema else ""
    return f"{schema['type']}{of}{default}"


def _when(task: str) -> str:
    found = [tick for tick in SCHEDULE if tick.task == task]
    return f"every {found[0].every:g} s" if found else ""


ORDERS: Mapping[str, type[BaseModel]] = {
    REFRESH_TASK: RefreshOrder,
    REFRESH_MANY_TASK: RefreshOrders,
    **{f"stillroom.{kind}": model for kind, model in orders.KINDS.items()},
}


# Metrics, findings, keys, commands


def metric_names() -> str:
    """Every metric of /metrics."""
    rows = [(f"`{family.name}`", family.kind, family.about) for family in families()]
    return (
        "# Metrics\n\n"
        "`/metrics` is Prometheus' text format, version 0.0.4. Counters are added up in Redis by all "
        "processes, so any process may be scraped, and one is enough. A figure that is not known is left "
        "out. Labels never hold a key, an address or a user.\n\n"
        + _table(("Metric", "Type", "Meaning"), rows)
    )


def families() -> list[metrics.Family]:
    """The metrics of a report that knows nothing; their names are the same in each."""
    report = Report.model_construct(
        status="pass",
        advice=[],
        servers=[],
        cache=None,
        sessions=None,
        limits=None,
        tasks=None,
        totals={"hits": 0},
    )
    return [
        *metrics._overall(report, 0.0),
        *metrics._servers(report),
        *metrics._services(report),
        *metrics._counted(report.totals or {}),
    ]


def findings() -> str:
    """Every finding of the health report that is a threshold."""
    rows = [
        (
            f"`{rule.code}`",
            _threshold(rule),
            rule.what.format(v=Measured(), whose=""),
            rule.good,
            rule.todo,
            rule.source,
        )
        for rule in advice.RULES
    ]
    return (
        "# Findings\n\n"
        "`room.health.check()`, `/health`, `/status` and `stillroom health` tell these. *v* is the value that "
        "was measured.\n\n"
        + _table(("Finding", "Warns, fails at", "What", "Good", "Do", "Source"), rows)
        + "\nOthers have no threshold. What to do stands in the report.\n\n"
        + _table(("Finding", "What"), [(f"`{code}`", what) for code, what in OTHERS.items()])
        + "\n`STILLROOM_HEALTH_ACCEPT` takes these codes.\n"
    )


class Measured:
    """Stands for the value in a finding's sentence, whatever its format, and for more than one where it counts."""

    def __format__(self, spec: str) -> str:
        return f"*v* {spec.partition('|')[2]}".rstrip()


def _threshold(rule: advice.Rule) -> str:
    def said(level: float | None) -> str:
        """Return a level as a person reads it: a billionth stands for whatever is more than nothing."""
        return "–" if level is None else "any" if 0 < level < 1e-6 else f"{level:g}"

    return ", ".join(map(said, (rule.warn, rule.fail)))


def key_dictionary() -> str:
    """The data dictionary of keys.py, as it stands there."""
    return f"# Keys in Redis\n\n```text\n{inspect.cleandoc(keys.__doc__ or '')}\n```\n"


def commands() -> str:
    """`stillroom --help` and the help of each command."""
    root = typer.main.get_command(command_line.app)
    return "# The `stillroom` command\n\n" + "\n".join(_helps("stillroom", root))


def _helps(name: str, command: Any) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if not children:
        yield f"## `{name}`\n\n{_line(command.help or '')}\n\n{_options(command)}"
    for word in sorted(children):
        yield from _helps(f"{name} {word}", children[word])


def _options(command: Any) -> str:
    rows = [
        (f"`{_called(one)}`", _given(one.default), _line(getattr(one, "help", None) or ""))
        for one in command.params
        if one.name != "help"
    ]
    return _table(("Option", "Default", "Meaning"), rows) if rows else ""


def _called(one: Any) -> str:
    names = [*one.opts, *one.secondary_opts]
    return ", ".join(names) if one.param_type_name == "option" else str(one.name).upper()


def _given(default: Any) -> str:
    return "" if default in (None, False) or callable(default) else f"`{default}`"


# Numbers


def numbers() -> str:
    """Every limit that is no setting, with what happens past it."""
    rows = [(what, f"{number:,}", past) for what, number, past in NUMBERS]
    return (
        "# Numbers\n\n"
        "Limits that are in the code. Those that can be changed are [settings](settings.md).\n\n"
        + _table(("Limit", "Number", "Past it"), rows)
    )


NUMBERS: Sequence[tuple[str, float, str]] = [
    ("bytes of a key or tag, escaped", keys.KEY_LIMIT, "`InvalidKey`"),
    ("tags of an entry", keys.TAGS_LIMIT, "`InvalidArgument`; a loaded value is not kept"),
    (
        "globs among the marks of invalidations",
        GLOBS_KEPT,
        "the next one begins a new epoch, as `clear()` does",
    ),
    ("keys in one `invalidate_keys` order", 1_000, "the order is refused"),
    ("orders that wait in Redis", ORDERS_LIMIT, "`DispatchFailed`"),
    ("tries of an order", TRIES_LIMIT, "it becomes a dead letter"),
    ("dead letters kept", LETTERS_LIMIT, "the oldest go"),
    ("days a dead letter is kept", KEPT_S / 86_400, "it goes"),
    ("entries one request remembers (`memo=True`)", MEMO_LIMIT, "further keys are asked for again"),
    ("hits in a limit's quota", QUOTA_LIMIT, "`InvalidLimit`"),
    ("days in a limit's window", WINDOW_LIMIT / 86_400, "`InvalidLimit`"),
    (
        "slices of a window in which hits are merged",
        SLICES,
        "a quota up to this number is exact; a larger one admits a little less, never more",
    ),
    ("seconds a denial is answered from memory at most", REMEMBERED_S, "Redis is asked again"),
    ("names of limits that operators changed", MOST, "the next change is refused"),
    ("days such a change may last", LONGEST_S / 86_400, "it is refused"),
    ("events of abuse kept in the stream", EVENTS_KEPT, "the oldest go"),
    ("events of one kind a process reports a second", EVENTS_A_SECOND, "they are counted together"),
    ("waiters of one lock", WAITERS, "`LockTaken` at once"),
    ("characters of a pepper, at least", PEPPER_LEAST, "`SettingsError`"),
]


# The API, from docstrings, by Sphinx itself

# What a class shows besides its docstring: its own members, unless one of these or a list of names stands there.
OWN, INHERITED, NONE = "", "inherited", "none"

API: Mapping[str, Mapping[str, str]] = {
    "The room": {"Stillroom": INHERITED, "AsyncStillroom": OWN},
    "The cache": {
        "Cache": INHERITED,
        "CachedFunction": OWN,
        "CachedValue": OWN,
        "Freshness": OWN,
        "ImageInfo": OWN,
        "cache.Tasks": OWN,
    },
    "Sessions": {"Sessions": INHERITED, "Session": OWN, "Device": OWN, "SessionEvent": OWN},
    "Limits": {
        "Limits": INHERITED,
        "Limit": OWN,
        "Decision": OWN,
        "Reservation": OWN,
        "Route": OWN,
        "Routes": OWN,
        "Standing": OWN,
        "Change": OWN,
    },
    "Abuse": {"Abuse": INHERITED, "Ban": OWN, "Rule": OWN},
    "Health": {"Health": INHERITED},
    "Locks": {"Lock": OWN, "Held": INHERITED},
    "Events": {"events.Event": OWN},
    "Dispatch": {"CeleryDispatch": NONE, "InlineDispatch": NONE, "NoDispatch": NONE},
}
AWAITED = (
    "AsyncCache",
    "AsyncCachedFunction",
    "AsyncSessions",
    "AsyncLimits",
    "AsyncAbuse",
    "AsyncHealth",
    "AsyncLock",
    "AsyncHeld",
)
READY_MADE = {
    "API": stillroom.API,
    "AUTH": stillroom.AUTH,
    "DEFAULT": stillroom.DEFAULT,
    "STATIC": stillroom.STATIC,
}
SESSION = (
    "user_id, found, login, logout, clear, renew, confirm, is_fresh, require_fresh, mutate, save"
)

INTEGRATIONS: Mapping[str, Mapping[str, str]] = {
    "FastAPI and Starlette": {
        "web.asgi.StillroomMiddleware": NONE,
        "web.fastapi.limited": OWN,
        "web.starlette.limited": OWN,
        "web.starlette.exempt": OWN,
        "web.starlette.load_session": OWN,
        "web.starlette.fresh_session": OWN,
        "web.starlette.LimitExceeded": NONE,
        "web.fastapi_room.lifespan": OWN,
        "web.fastapi_room.load_within": OWN,
    },
    "Flask": {
        "web.flask.StillroomSessions": NONE,
        "web.flask.FlaskSession": NONE,
        "web.flask.StillroomLimits": "init_app",
        "web.flask.limited": OWN,
        "web.flask.exempt": OWN,
        "web.flask.fresh": OWN,
        "web.flask.LimitExceeded": NONE,
    },
    "Django": {
        "web.django.room": OWN,
        "web.django.cache.StillroomCache": NONE,
        "web.django.sessions.SessionStore": NONE,
        "web.django.middleware.SessionMiddleware": NONE,
        "web.django.limits.LimitsMiddleware": "exempt_when, render",
        "web.django.limits.limited": OWN,
        "web.django.limits.exempt": OWN,
        "web.django.views.fresh": OWN,
        "web.django.pages.cache_page": OWN,
        "web.django.after_commit.invalidates": OWN,
        "web.django.after_commit.InvalidatingQuerySet": "tagged",
        "web.django.after_commit.invalidate": OWN,
        "web.django.after_commit.invalidate_by_tag": OWN,
        "web.django.after_commit.invalidate_by_pattern": OWN,
    },
    "Any WSGI app": {"web.wsgi.StillroomMiddleware": NONE},
    "The session of a request": {
        "web.WebSession": SESSION,
        "web.AsyncWebSession": "load, save",
        "web.SessionCookie": "for_test_client",
    },
    "What limits are given": {"web.Header": OWN, "web.Answered": OWN, "web.Refusal": OWN},
    "Whole responses": {"web.pages.Pages": "page, install", "web.pages.tag_page": OWN},
    "Health and explanations": {
        "web.HealthWSGI": NONE,
        "web.HealthASGI": NONE,
        "web.explain.ExplainWSGI": NONE,
        "web.explain.ExplainASGI": NONE,
    },
    "SQLAlchemy": {
        "integrations.sqlalchemy.AfterCommit": OWN,
        "integrations.sqlalchemy.invalidates": OWN,
    },
    "Tests": {
        "testing.Clock": OWN,
        "testing.TestServer": OWN,
        "embedded.EmbeddedServer": OWN,
    },
}


def api() -> str:
    """The public classes by autodoc."""
    awaited = ", ".join(f"`{name}`" for name in AWAITED)
    ready = [
        (f"`{name}`", f"{limit.quota:,} in {limit.window:,} s", f"`{limit.by}`", f"`{limit.away}`")
        for name, limit in READY_MADE.items()
    ]
    return (
        "# The API\n\n"
        "`from stillroom import …` has all of these, except where a longer name is shown. What plugs into a "
        "framework or a database is [a page of its own](integrations.md). The awaiting faces have the same "
        f"names, arguments and results as the blocking ones, with `await`: {awaited}.\n\n"
        + _documented(API)
        + "\n## Ready-made limits\n\n`from stillroom import API, AUTH, DEFAULT, STATIC`. Make your own as "
        "`Limit(name, quota, window)`.\n\n"
        + _table(("Limit", "Quota", "By", "While Redis is away"), ready)
    )


def integrations() -> str:
    """What apps import for their framework, their database and their tests, by autodoc."""
    return (
        "# Frameworks, databases, tests\n\n"
        "Each name is imported from the module that stands before it: "
        "`from stillroom.web.flask import limited`. How they work together is shown in the "
        "[recipes](../recipes.md) and [how-to guides](../howto/index.md).\n\n"
        + _documented(INTEGRATIONS)
    )


def _documented(parts: Mapping[str, Mapping[str, str]]) -> str:
    return "\n".join(
        f"## {title}\n\n```{{eval-rst}}\n"
        + "\n".join(_directive(f"stillroom.{name}", shown) for name, shown in names.items())
        + "```\n"
        for title, names in parts.items()
    )


def _directive(path: str, shown: str) -> str:
    """Return Sphinx's words for one class or function.

    It is imported here, because Sphinx imports modules as type checkers see them, and pydantic raises then.
    """
    thing = pkgutil.resolve_name(path)
    if not inspect.isclass(thing):
        return f".. autofunction:: {path}\n"
    options = {
        OWN: [":members:"],
        INHERITED: [":members:", ":inherited-members:"],
        NONE: [],
    }.get(shown, [f":members: {shown}", ":inherited-members:"])
    if issubclass(
        thing, tuple
    ):  # it says "Alias for field number 0" of each; the signature has them, too
        options = [*options, f":exclude-members: {', '.join(vars(thing)['_fields'])}"]
    return "\n".join([f".. autoclass:: {path}", *(f"   {one}" for one in options), ""])


def index() -> str:
    """The table of contents of the reference."""
    names = [name for name in PAGES if name != "index"]
    return (
        "# Reference\n\nMade from the code.\n\n```{toctree}\n:maxdepth: 1\n\n"
        + "\n".join(names)
        + "\n```\n"
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "index": index,
    "api": api,
    "integrations": integrations,
    "settings": settings,
    "errors": error_pages,
    "tasks": tasks,
    "metrics": metric_names,
    "findings": findings,
    "keys": key_dictionary,
    "commands": commands,
    "numbers": numbers,
}


# For machines

ABOUT = """# Stillroom

> The Redis state a web app shares (cache, sessions, rate limits, health), called inside its requests, and the
> Celery workers that keep it fresh. Python 3.11 or newer; FastAPI, Starlette, Flask, Django, any WSGI or ASGI app.

Each page is Markdown. `stillroom docs PAGE` prints one. The reference is made from the code when the documentation
is built; the docstrings have the same text: those of `stillroom.settings.Settings`, `stillroom.errors`,
`stillroom.keys`, `stillroom.Cache`, `Sessions`, `Limits`, `Abuse`, `Health` and `Stillroom`.
"""
SECTIONS: Mapping[str, str] = {
    "Begin": "tutorial.md recipes.md wire.md glossary.md",
    "How to": "howto/*.md",
    "Migrate": "migration/*.md",
    "Understand": "explanation/*.md architecture.md",
    "Run": "operating.md asvs.md",
}


def llms_txt(docs: Path) -> str:
    """The list of pages, with the first sentence of each: https://llmstxt.org."""
    parts = [ABOUT]
    for title, patterns in SECTIONS.items():
        found = [page for one in patterns.split() for page in sorted(docs.glob(one))]
        lines = [_entry(page, docs) for page in found if page.stem != "index"]
        parts.append(f"## {title}\n\n" + "".join(lines))
    return "\n".join(parts)


def _entry(page: Path, docs: Path) -> str:
    title, _, text = page.read_text(encoding="utf-8").partition("\n")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    first = next(
        part for part in prose.split("\n\n") if part.strip()[:1].isalpha() or "`" in part[:2]
    )
    sentence = re.split(r"(?<=\.) ", re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", _line(first)))[0]
    return f"- [{title.removeprefix('# ')}]({page.relative_to(docs)}): {sentence}\n"


# Text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _prose(thing: object) -> str:
    return inspect.getdoc(thing) or ""


if __name__ == "__main__":
    here = Path(__file__).parent
    write(here / "reference")
    (here / "llms.txt").write_text(llms_txt(here), encoding="utf-8")
