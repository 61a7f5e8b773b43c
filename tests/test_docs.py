"""The documentation names only settings, tests, pages and metrics that exist."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from typer.main import get_command

import stillroom
from stillroom import Settings, Stillroom
from stillroom.cli import app
from stillroom.environment import SECRETS
from stillroom.settings import environment_names
from tests.specification import sentences

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# What is no setting of ours: a task queue's, an image's, a make variable.
OF_OTHERS = {"STILLROOM_IMAGE"}


def written_pages() -> list[Path]:
    """Return the pages that people write; the reference is made from the code."""
    made = {DOCS / "reference", DOCS / "_build"}
    pages = [page for page in DOCS.rglob("*.md") if not made & set(page.parents)]
    return [*pages, *ROOT.glob("*.md"), ROOT / "examples/shop/README.md"]


@pytest.mark.parametrize("page", written_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_settings_that_exist(page: Path) -> None:
    """Each variable that a page names is spelled as the settings spell it."""
    known = {*environment_names().values(), *(f"{name}_FILE" for name in SECRETS.values())}
    named = set(
        re.findall(
            r"\b(?:STILLROOM_[A-Z0-9_]*[A-Z0-9]|REDIS_URL|REDIS_PASSWORD)\b", page.read_text()
        )
    )
    assert named - OF_OTHERS <= known


def pages_of_today() -> list[Path]:
    """Return those of them that do not tell of what there was."""
    return [
        page
        for page in written_pages()
        if page.name != "CHANGELOG.md" and page.parent.name != "decisions"
    ]


@pytest.mark.parametrize("page", pages_of_today(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_types_only_commands_that_exist(page: Path) -> None:
    """Each command that a page shows is there, and has the options that it is shown with."""
    typed = re.findall(r"(?:`|\$ )stillroom ([\w-][^`|\n;&)#]*)", page.read_text())
    assert [words for words in map(str.split, typed) if _unknown(words)] == []


def _unknown(words: list[str]) -> list[str]:
    """Return what the command line does not know of these words: a command, or options."""
    command: Any = get_command(app)
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", ()):
        command = command.commands[rest.pop(0)]
    if getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
        return rest[:1]
    known = {name for one in command.params for name in one.opts} | {"--help"}
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    return sorted(options - known)


def test_asvs_names_tests_that_exist() -> None:
    """Each line of the ASVS page that Stillroom answers names a test, and the test is there."""
    page = (DOCS / "asvs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \|(.+)\|$", page, flags=re.MULTILINE)
    assert len(rows) >= 45
    for line, rest in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", rest)
        assert named or "| app |" in rest, f"{line} names no test"
        for file, name in named:
            assert name in named_in(file), f"{line}: {file}::{name}"


@cache
def named_in(file: str) -> frozenset[str]:
    """Return the tests in a file, those of a class as `Class::test`."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    found = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for group in (node for node in body if isinstance(node, ast.ClassDef)):
        found |= {
            f"{group.name}::{node.name}" for node in group.body if isinstance(node, ast.FunctionDef)
        }
    return frozenset(found)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the reference, made from the code as a build of the documentation makes it."""
    folder = tmp_path_factory.mktemp("docs") / "reference"
    script = f"import reference, pathlib; reference.write(pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=DOCS, check=True, timeout=60)
    return folder


def test_each_setting_says_what_it_is(reference: Path) -> None:
    """The reference has every setting with its default and a sentence, which is its docstring."""
    rows = re.findall(
        r"^\| `(\w+)`.*\| `(\w+)` \| (.+?) \| .* \| (.*?) \|$",
        (reference / "settings.md").read_text(),
        re.MULTILINE,
    )
    assert {field for _, field, _, _ in rows} == set(environment_names())
    assert [field for _, field, _, says in rows if not re.match(r"[A-Z].{15,}", says)] == []


def test_the_reference_tells_the_defaults(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default in the reference is what a room has that was told nothing."""
    for name in environment_names().values():
        monkeypatch.delenv(name, raising=False)
    settings, fields = Settings(), {name: field for field, name in environment_names().items()}
    rows = re.findall(
        r"^\| `(\w+)`.*?\| `\w+` \| (.+?) \|", (reference / "settings.md").read_text(), re.M
    )
    assert len(rows) > 60
    for variable, told in rows:
        actual = getattr(settings, fields[variable])
        text = " ".join(map(str, actual)) if isinstance(actual, tuple) else f"{actual}"
        assert told.strip("`") in (text, text.removesuffix(".0")) or not actual, variable


def test_the_reference_tells_what_is_allowed(reference: Path) -> None:
    """A setting's range is in the reference, also where the setting may be left out."""
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\| `\w+` \| [^|]+ \| ([^|]*) \|",
        (reference / "settings.md").read_text(),
        re.M,
    )
    allowed = dict(rows)
    assert allowed["STILLROOM_REPLICAS"] == allowed["STILLROOM_CACHE_REPLICAS"] == "≥ 0, ≤ 10"
    assert allowed["STILLROOM_TTL"] == "≥ 0.001, ≤ 31,622,400"


def test_each_member_in_the_reference_says_what_it_is(reference: Path) -> None:
    """A property or a method of a class in the API has a docstring: without one the reference does not show it."""
    classes = re.findall(
        r"^\.\. autoclass:: ([\w.]+)\n   :members:\n(   :inherited-members:)?",
        (reference / "api.md").read_text(),
        re.M,
    )
    assert len(classes) > 20
    silent = []
    for path, inherits in classes:
        kind = pkgutil.resolve_name(path)
        for name in dir(kind) if inherits else vars(kind):
            member = inspect.getattr_static(kind, name)
            if (
                name[0] != "_"
                and isinstance(member, property | FunctionType)
                and not member.__doc__
            ):
                silent.append(f"{path}.{name}")
    assert silent == []


def test_each_error_says_what_to_answer(reference: Path) -> None:
    """The reference has every public error, with what a web app answers."""
    page = (reference / "errors.md").read_text()
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    kinds = {name for name in stillroom.__all__ if is_error(getattr(stillroom, name))}
    assert kinds <= set(parts)
    silent = {name for name, text in parts.items() if "*Answer:*" not in text}
    assert silent <= {"StillroomError", "UnknownSetting"}


def test_each_public_name_is_in_the_reference(reference: Path) -> None:
    """The API page has each name that can be imported from stillroom, except for errors and Settings."""
    page = (reference / "api.md").read_text()
    named = set(re.findall(r"^\.\. autoclass:: stillroom\.(\w+)$", page, re.MULTILINE))
    named |= set(re.findall(r"`(\w+)`", page))
    public = {name for name in stillroom.__all__ if not is_error(getattr(stillroom, name))}
    assert public - {"Settings"} - named == set()


def test_what_plugs_into_a_framework_is_in_the_reference(reference: Path) -> None:
    """Each class and function that an app imports from stillroom on a page is in the reference."""
    text = "".join((reference / f"{name}.md").read_text() for name in ("api", "integrations"))
    shown = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, re.MULTILINE)
    known = [*map(pkgutil.resolve_name, shown)]
    taken = {name for page in pages_of_today() for name in imported_on(page)}
    things = {name: pkgutil.resolve_name(name) for name in taken}
    absent = {name for name, thing in things.items() if is_api(thing) and thing not in known}
    # A manager is made from the queryset, which is in the reference.
    assert absent == {"stillroom.web.django.after_commit.InvalidatingManager"}


def imported_on(page: Path) -> set[str]:
    """Return what the Python on a page imports from Stillroom's modules, by its dotted name."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    return {
        f"{node.module}.{one.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stillroom.")
        for one in node.names
    }


def is_api(thing: object) -> bool:
    return inspect.isclass(thing) or inspect.isfunction(thing)


def is_error(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, stillroom.StillroomError)


def test_each_metric_is_in_the_reference(reference: Path, room: Stillroom) -> None:
    """What /metrics tells a scraper is described in the reference."""
    from stillroom.health.metrics import exposition

    room.cache.get("nothing")
    room.cache.flush_stats()
    text = exposition(room.health.check(), 0.0).decode()
    told = set(re.findall(r"^# TYPE (\w+)", text, flags=re.MULTILINE))
    assert len(told) > 10
    assert told <= set(re.findall(r"`(stillroom_\w+)`", (reference / "metrics.md").read_text()))


def test_each_task_is_in_the_reference(reference: Path) -> None:
    """Other Celery clients find every task by its name, with the queue that it goes to and its arguments."""
    from stillroom_workers.app import make_app

    page, app = (reference / "tasks.md").read_text(), make_app(Settings())
    for name in (name for name in app.tasks if name.startswith("stillroom.")):
        assert f"| `{name}` | `{app.queue_of(name)}` |" in page
    assert "| `stillroom.refresh` | `stillroom.refresh` |" in page
    assert (
        "| `stillroom.invalidate_tags` | `stillroom.maintenance` | `tags`: array of string" in page
    )


def test_each_page_says_what_it_does_not_do() -> None:
    """Guides, explanations and the tutorial say where they end, or when to use something else."""
    said = re.compile(
        r"^## (What (it|this \w+) (does not do|leaves out)|When to use something else)",
        re.MULTILINE,
    )
    pages = [
        *(DOCS / "howto").glob("*.md"),
        *(DOCS / "explanation").glob("*.md"),
        DOCS / "tutorial.md",
    ]
    silent = [
        page.name for page in pages if page.name != "index.md" and not said.search(page.read_text())
    ]
    assert silent == []


def test_machines_find_every_page() -> None:
    """llms.txt lists each page that people write, with its title; `python docs/reference.py` renews it."""
    script = "import reference, pathlib; print(reference.llms_txt(pathlib.Path()), end='')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=DOCS, check=True, timeout=60, capture_output=True, text=True)
    listed = (DOCS / "llms.txt").read_text(encoding="utf-8")
    assert listed == done.stdout
    pages = {page.relative_to(DOCS).as_posix() for page in written_pages() if DOCS in page.parents}
    ours = {page for page in pages if not page.startswith("decisions/") and "index" not in page}
    assert set(re.findall(r"\]\(([\w./-]+\.md)\)", listed)) == ours


def test_decisions_are_numbered_once_and_have_three_parts() -> None:
    """A decision has a number of its own, a title, its context, the choice and what it costs."""
    pages = sorted((DOCS / "decisions").glob("0*.md"))
    numbers = [page.name[:4] for page in pages]
    assert len(numbers) == len(set(numbers))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.match(rf"# 0*{int(page.name[:4])}[.:] [A-Z].+\n", text), page.name
        for part in ("Context", "Choice", "Cost|What it costs"):
            assert re.search(rf"^\*\*({part})", text, re.MULTILINE), f"{page.name}: {part}"


def test_the_tests_read_as_a_specification() -> None:
    """Each test says in a sentence what is true, and `make spec` prints all of them."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    said = [(file.name, sentence) for file in files for sentence in sentences(file)]
    assert len(said) > 1_000
    unsaid = [one for one in said if not re.search(r"\w.*[.!?:\"`)]$", one[1])]
    assert unsaid == []
    command = [sys.executable, "-m", "tests.specification", "test_docs"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert "  - Each test says in a sentence" in done.stdout
