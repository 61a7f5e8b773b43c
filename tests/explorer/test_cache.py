"""The cache keeps its promises in every accident the explorer knows, and the explorer finds broken variants."""

from __future__ import annotations

import pytest

from tests.explorer.cache import CacheModel, ShardsModel
from tests.explorer.explorer import Broken, Model, explore, maker, search
from tests.explorer.mutants import MUTANTS
from tests.explorer.world import World

RUNS = {
    True: 750,
    False: 50,
}  # of each kind; in full they are 14,150 together with the state's and the copies'
FINDS_WITHIN = 2_500

# Events that happen more often than usual, by the subject of a part of the runs.
ABOUT: dict[str, tuple[type[Model], dict[str, float]]] = {
    "everything": (CacheModel, {}),
    "writes": (CacheModel, {"write": 12.0, "read": 4.0}),
    "background": (CacheModel, {"work": 8.0, "order": 5.0}),
    "loss": (CacheModel, {"lose": 6.0, "die": 3.0}),
    "shards": (ShardsModel, {}),
}


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("about", ABOUT)
def test_no_accident_breaks_a_promise(world: World, about: str, is_full: bool) -> None:
    """No read shows an invalidated value, whatever is lost, late, doubled, restarted or stepped."""
    first, runs = list(ABOUT).index(about) * 1_000_000, RUNS[is_full]
    model, weights = ABOUT[about]
    assert explore(world, range(first, first + runs), maker(model, **weights)) == runs


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_broken_is_found(world: World, mutant: str) -> None:
    """Each broken variant of the cache breaks a promise in one of the runs, whose story is printed."""
    acts = {"read": 14.0, "write": 2.0} if "load" in mutant else {"write": 9.0}
    make = maker(CacheModel, **acts)
    with MUTANTS[mutant](), pytest.raises(Broken, match="in spite of") as broken:
        search(world, mutant, FINDS_WITHIN, make)
    assert "begins in process" in str(broken.value)
