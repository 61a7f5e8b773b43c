"""After a commit, with any order of savepoints, exactly the invalidations of kept changes happen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from stillroom import NoDispatch, Settings, Stillroom
from stillroom.integrations.pending import Pending
from stillroom.integrations.sqlalchemy import AfterCommit

# add a tag, begin a savepoint, keep the innermost one, roll it back
STEPS = st.lists(st.sampled_from(["add", "begin", "keep", "undo"]), max_size=30)


class Model:
    """A stack of sets, as a database keeps its changes."""

    def __init__(self) -> None:
        self.stack: list[set[str]] = [set()]

    def keep(self) -> None:
        top = self.stack.pop()
        self.stack[-1] |= top

    def end(self, *, commit: bool) -> set[str]:
        """Return what is committed; open savepoints go with their transaction."""
        return set().union(*self.stack) if commit else set()


class Recorded(AfterCommit):
    """A recorder that invalidates nothing and remembers every invalidation."""

    def __init__(self, room: Stillroom) -> None:
        super().__init__(room)
        self.told: set[str] = set()

    def _deliver(self, pending: Pending) -> None:
        self.told |= {name for act in pending.acts() for name in act.names}


@pytest.fixture(scope="module")
def room() -> Iterator[Stillroom]:
    with Stillroom(Settings(redis_url="redis://127.0.0.1:1"), dispatch=NoDispatch()) as room:
        yield room


@given(steps=STEPS, commit=st.booleans())
@settings(deadline=None)
def test_sqlalchemy_s_savepoints(room: Stillroom, steps: list[str], commit: bool) -> None:
    """A released savepoint hands on its invalidations, and a rolled back one forgets them with its inner ones."""
    engine = create_engine("sqlite://")
    recorded, model, savepoints = Recorded(room), Model(), []
    with Session(engine) as session:
        recorded.watch(session)
        session.connection()
        for number, step in enumerate(steps):
            take(step, f"t{number}", session, recorded, model, savepoints)
        if commit:
            session.commit()
        else:
            session.rollback()
        assert recorded.told == model.end(commit=commit)
        session.commit()
    assert recorded.told == model.end(commit=commit)
    engine.dispose()


def take(
    step: str,
    tag: str,
    session: Session,
    recorded: Recorded,
    model: Model,
    savepoints: list[Any],
) -> None:
    if step == "add":
        recorded.invalidate_by_tag(session, tag)
        model.stack[-1].add(tag)
    elif step == "begin":
        savepoints.append(session.begin_nested())
        model.stack.append(set())
    elif savepoints:
        savepoint = savepoints.pop()
        if step == "keep":
            savepoint.commit()
            model.keep()
        else:
            savepoint.rollback()
            model.stack.pop()
