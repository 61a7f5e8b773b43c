"""A function is called once its process ends, whoever ends it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from stillroom.at_exit import AtExit


@pytest.mark.parametrize("module", ["celery.signals", "multiprocessing.util"])
def test_a_library_that_another_thread_is_importing_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """While a thread imports a library, and its module is still empty, a function is armed and disarmed."""
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    ending = AtExit(list)
    ending.arm()
    ending.disarm()
