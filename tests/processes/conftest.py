"""What the tests of processes compare theirs with."""

from __future__ import annotations

import pytest

from tests.support.processes import our_children


@pytest.fixture
def others() -> set[int]:
    """Return the processes of other fixtures, such as a server for the whole session."""
    return our_children()
