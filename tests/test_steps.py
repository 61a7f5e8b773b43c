"""Our calls take no more steps of Python than the kept results of the bench say: none gets dearer unseen."""

from __future__ import annotations

import importlib
import json
import platform
from typing import Any

import pytest

from bench.__main__ import RESULTS
from bench.harness import Contestant, Field
from bench.stage import Stage, stage

KEPT: dict[str, Any] = json.loads((RESULTS / "results.json").read_text())
MORE = 1.02
WARM_UP = 100  # hits
APART = {"Flask with ours", "Django with ours"}  # each configures what a process has only one of


def ours(part: str, here: Stage) -> list[Contestant]:
    """Return our own calls among those that a part of the bench measures."""
    where = here.url if part == "hits" else here
    contestants = importlib.import_module(f"bench.{part}").contestants(where)
    return [one for one in contestants if one.role == "ours" and one.name not in APART]


@pytest.mark.timeout(method="thread")  # a signal has a handler, for which each receive would look
@pytest.mark.parametrize("part", ["hits", "sessions", "limits", "requests"])
def test_no_call_takes_more_steps_than_the_kept_results_say(part: str) -> None:
    """Steps are the same on each machine. Whoever needs more of them measures again: `make bench ARGS=<part>`."""
    python = KEPT[part]["machine"]["python"]
    if platform.python_version_tuple()[:2] != tuple(python.split(".")[:2]):
        pytest.skip(f"the results were kept with Python {python}")
    steps: dict[str, float] = {}
    with stage() as here, Field() as field:
        for contestant in ours(part, here):
            field.enter(contestant)
            field.measure(contestant, WARM_UP)
            steps[contestant.name] = field.count(contestant)
    kept = {name: KEPT[part]["figures"][name]["steps"] for name in steps}
    assert {name: found for name, found in steps.items() if found > MORE * kept[name]} == {}
