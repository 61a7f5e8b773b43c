"""Each page of docs/howto has code that runs as it stands."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stillroom import Settings, Stillroom
from stillroom.abuse.rules import read_rules
from stillroom.cli import app
from stillroom.settings import environment_names
from tests.support import nursery
from tests.support.guide import DOCS, blocks, run_pytest, write_files
from tests.support.web import GUNICORN, UVICORN, Browser, environment_of, serving_process

PLUGIN = 'pytest_plugins = ["stillroom.testing"]\n'


@pytest.fixture
def environment(stillroom_settings: Settings) -> dict[str, str]:
    return environment_of(stillroom_settings)


def run(folder: Path, environment: dict[str, str], *words: str) -> str:
    """Run Python in the folder, with warnings as errors; return what it printed."""
    told = {**os.environ, **environment, "PYTHONWARNINGS": "error"}
    done = nursery.run_text(words, told, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def first_page(port: int, path: str) -> str:
    """Return the first answer of a server that is just starting, on a busy machine too."""
    for _ in range(5):
        with contextlib.suppress(TimeoutError):
            return Browser(port).get(path).text
    return Browser(port).get(path).text


def test_testing(tmp_path: Path) -> None:
    """The page about tests is a test suite that passes."""
    write_files("howto/testing.md", tmp_path)
    assert "4 passed" in run_pytest(tmp_path)


def test_after_commit_in_sqlalchemy(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on SQLAlchemy invalidates after commits, and not after rollbacks, for statements and
    SQL text too.
    """
    write_files("howto/after-commit.md", tmp_path)
    run(tmp_path, environment, "edit.py")


DJANGO = """
import django
from django.conf import settings
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()
from django.db import connection
from models import Brand, Product
from views import load_price, raise_price, sale
with connection.schema_editor() as schema:
    schema.create_model(Brand)
    schema.create_model(Product)
Product.objects.create(id=7, price=10, brand=Brand.objects.create())
assert load_price(7) == 10
raise_price(7, by=2)
assert load_price(7) == 12
sale()
assert load_price(7) == 1
connection.close()
"""


def test_after_commit_in_django(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on Django invalidates after a save, and after an update that says its tags."""
    write_files("howto/after-commit.md", tmp_path, project=DJANGO)
    run(tmp_path, environment, "project.py")


def test_pages(tmp_path: Path) -> None:
    """The page on pages caches, checks and invalidates one."""
    write_files("howto/pages.md", tmp_path, conftest=PLUGIN)
    assert "1 passed" in run_pytest(tmp_path)


PAGES = """
import django
from django.conf import settings
from django.template import Context, Template
from django.test import Client
from django.urls import path
from pathlib import Path
settings.configure(
    ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], INSTALLED_APPS=["stillroom.web.django"],
    CACHES={"default": {"BACKEND": "stillroom.web.django.cache.StillroomCache"}},
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
)
django.setup()
from views import product
urlpatterns = [path("products/<int:id>", product)]
said = [Client().get("/products/7") for _ in range(2)]
assert [one["Cache-Status"] for one in said] == ["stillroom; fwd=miss; stored", "stillroom; hit"]
assert "takes long" in Template(Path("product.html").read_text()).render(Context({"request": None}))
"""


def test_pages_in_django(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on Django's pages caches a view and a fragment."""
    write_files("howto/pages.md", tmp_path, project=PAGES)
    run(tmp_path, environment, "project.py")


def test_locks(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on locks takes a lock, a semaphore, and tries without waiting."""
    write_files("howto/locks.md", tmp_path)
    run(tmp_path, environment, "jobs.py")


def test_warm(tmp_path: Path, environment: dict[str, str], stillroom: Stillroom) -> None:
    """The page on warm-ups loads what the loaders list, a request asks once, and a page for all at once."""
    write_files("howto/warm.md", tmp_path)
    run(tmp_path, environment, "page.py")
    run(tmp_path, environment, "together.py")
    worker = "from shop import room; print(room.tasks.warm(), room.cache.reclaim())"
    assert run(tmp_path, environment, "-c", worker).startswith("{'loaders': 2, 'values': 4}")
    assert stillroom.cache.get("product:3:de") == "product 3 in de"
    assert stillroom.cache.get("rates") == {"EUR": 1.0}


def test_flask(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on Flask serves an app factory with gunicorn, and its loader runs in a worker's room."""
    write_files("howto/frameworks.md", tmp_path)
    with serving_process([*GUNICORN, "flaskwsgi:app"], tmp_path, environment) as port:
        assert json.loads(first_page(port, "/price/7")) == {"price": 10, "visits": 1}
    worker = (
        "from stillroom import Settings; from stillroom_workers.lifecycle import open_room;"
        "room = open_room(Settings(loaders=('flaskwsgi:room',)));"
        "print(room.cache.loaders['load_price'].recipe({'id': 7}).loading().function(id=7)); room.close()"
    )
    assert run(tmp_path, environment, "-c", worker).strip() == "10"


def test_fastapi(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on FastAPI serves dependencies and two lifespans with uvicorn."""
    write_files("howto/frameworks.md", tmp_path)
    with serving_process([*UVICORN, "fastshop:app"], tmp_path, environment) as port:
        assert first_page(port, "/price/7") == "10"


def test_django(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on Django has settings that its checks accept."""
    write_files("howto/frameworks.md", tmp_path)
    (tmp_path / "settings.py").write_text(
        (tmp_path / "settings.py").read_text() + "SECRET_KEY = 'x' * 50\nUSE_TZ = True\n"
    )
    words = ("-m", "django", "check", "--deploy", "--tag", "stillroom", "--fail-level", "WARNING")
    named = {**environment, "STILLROOM_PRODUCTION": "1", "DJANGO_SETTINGS_MODULE": "settings"}
    assert "no issues" in run(tmp_path, {**named, "PYTHONPATH": str(tmp_path)}, *words)
    loading = "import django; django.setup(); from prices import load_price; print(load_price(7))"
    assert run(tmp_path, named, "-c", loading) == "10\n"


def test_tags(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on tags invalidates a thing, its groups and the lists that show it."""
    write_files("howto/tags.md", tmp_path)
    run(tmp_path, environment, "edit.py")


def test_limits(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on limits gives a user, a key and a plan their own quotas, and right logins use nothing up."""
    write_files("howto/limits.md", tmp_path)
    run(tmp_path, environment, "task.py")
    kind = {"Content-Type": "application/json"}
    right = json.dumps({"user": "ann", "password": "ann's secret"}).encode()
    with serving_process([*UVICORN, "shop:app"], tmp_path, environment) as port:
        assert first_page(port, "/openapi.json")
        ann = Browser(port)
        assert [ann.get("/login", "POST", kind, right).status for _ in range(7)] == [200] * 7
        assert [ann.get("/export").status for _ in range(3)] == [200, 200, 429]
        assert Browser(port).get("/export").status == 200, "a visitor counts by address"
        for path, key, quota in (
            ("/search", "a", 3),
            ("/search", "b", 3),
            ("/report", "k1", 3),
            ("/report", "k2", 1),
        ):
            seen = [
                Browser(port).get(path, "GET", {"X-API-Key": key}).status for _ in range(quota + 1)
            ]
            assert seen == [200] * quota + [429], (path, key)


DJANGO_SETTINGS = 'SECRET_KEY = ROOT_URLCONF = "djangoshop.settings"; urlpatterns = []'


@pytest.mark.parametrize(
    "server",
    [(*GUNICORN, "shop:app"), (*UVICORN, "fastshop:app"), (*GUNICORN, "djangoshop.wsgi")],
    ids=["flask", "fastapi", "django"],
)
def test_status(tmp_path: Path, environment: dict[str, str], server: tuple[str, ...]) -> None:
    """The page on status shows the public a status, and a token opens details, metrics and the page."""
    write_files("howto/status.md", tmp_path)
    (tmp_path / "djangoshop" / "settings.py").write_text(DJANGO_SETTINGS)
    token = {"Authorization": "Bearer of-sixteen-or-more-characters"}
    named = environment | {"STILLROOM_HEALTH_TOKEN": "of-sixteen-or-more-characters"}
    named["DJANGO_SETTINGS_MODULE"] = "djangoshop.settings"
    with serving_process([*server], tmp_path, named) as port:
        assert first_page(port, "/health/live")
        paths = ("/health/ready", "/health", "/metrics", "/status")
        assert [Browser(port).get(path).status for path in paths[:2]] == [200, 200]
        assert all(Browser(port).get(path).status in (401, 403, 404) for path in paths[2:])
        assert [Browser(port).get(path, "GET", token).status for path in paths] == [200] * 4


def test_deploy() -> None:
    """The page on deploying has a Kubernetes file that is YAML and names our program and existing settings."""
    (block,) = blocks("howto/deploy.md", "yaml")
    (container,) = yaml.safe_load(block)["spec"]["template"]["spec"]["containers"]
    assert {one["name"] for one in container["env"]} <= set(environment_names().values())
    assert " ".join(container["command"]).startswith("celery -A stillroom_workers worker")


def test_abuse(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on abuse reports logins, and with its rules file an address that fails as ten users is banned."""
    write_files("howto/abuse.md", tmp_path)
    (file,) = blocks("howto/abuse.md", "toml")
    (tmp_path / "abuse.toml").write_text(file)
    story = (
        "from login import log_in, room; from stillroom import API;"
        "assert not any(log_in(f'user{n}', '?', '203.0.113.7') for n in range(10));"
        "assert log_in('ann', 'ann\\'s secret', '203.0.113.8');"
        "room.abuse.report('card_declined', ip='203.0.113.9');"
        "room.upkeep.scan_abuse();"
        "checked = [room.limits.check(f'203.0.113.{n}', [API]) for n in (7, 8)];"
        "print(*[one.banned for one in checked]); room.close()"
    )
    named = {**environment, "STILLROOM_ABUSE_RULES": "abuse.toml"}
    assert run(tmp_path, named, "-c", story).split() == ["True", "False"]


def test_the_page_on_abuse_has_every_rule() -> None:
    """Each built-in rule is on the page, with what it says of itself and whether it may ban."""
    page = (DOCS / "howto/abuse.md").read_text(encoding="utf-8")
    rules = read_rules(None)
    assert all(rule.shadow for rule in rules)
    rows = [f"| `{rule.name}` | {rule.why} | {rule.action}s |" for rule in rules]
    assert re.findall(r"^\| `.*\|$", page, re.MULTILINE) == rows


NEAR_BEFORE = """
from dataclasses import dataclass
from types import SimpleNamespace
from stillroom import Stillroom
@dataclass
class Product:
    id: int
def fetch(id):
    asked.append(id)
    return Product(id)
asked, db, room = [], SimpleNamespace(fetch_product=fetch), Stillroom()
"""
NEAR_AFTER = """
assert asked == [7, 8, 9]
with room.request():
    assert product(8) == Product(8)
assert asked == [7, 8, 9]
room.cache.invalidate_by_tag("catalogue")
with room.request():
    product(8)
assert asked == [7, 8, 9, 8]
room.close()
"""


def test_near(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on values that a process keeps loads each once, and again after an invalidation."""
    (block,) = blocks("howto/near.md")
    (tmp_path / "page.py").write_text(NEAR_BEFORE + block + NEAR_AFTER)
    run(tmp_path, environment, "page.py")


SEEN_AFTER = """
import time
room.cache.get_or_set("slow", lambda: time.sleep(0.2) or 1)
assert [(event.service, event.seconds > 0.1) for event in slow][-1] == ("cache", True), slow
room.close()
"""


def test_seen(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page on finding out why has a hook that gets slow calls, and commands with options that there are."""
    (block,) = blocks("howto/seen.md")
    (tmp_path / "page.py").write_text(block + SEEN_AFTER)
    run(tmp_path, environment, "page.py")
    typed = "".join(blocks("howto/seen.md", "console"))
    commands = re.findall(r"^\$ stillroom (.*)$", typed, re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        known = CliRunner().invoke(app, [*command.split(), "--help"])
        assert known.exit_code == 0, (command, known.output)


def test_every_page_is_run() -> None:
    """Every page of docs/howto has a test here, or in a file of its own."""
    tests = "".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")
    )
    known = {
        "index",
        "abuse",
        "testing",
        "after-commit",
        "pages",
        "locks",
        "warm",
        "frameworks",
        "tags",
        "limits",
        "celery",
        "near",
        "seen",
        "status",
        "deploy",
    }
    assert {page.stem for page in (DOCS / "howto").glob("*.md")} == known
    assert [name for name in known - {"index"} if f'"howto/{name}.md"' not in tests] == []
