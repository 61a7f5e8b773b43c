"""The loader of the stack's shop, for commands in the tests' own process, where `shop` is another module."""

from stillroom import Stillroom

room = Stillroom("redis://127.0.0.1")  # never asked: commands take its loaders


@room.cache.cached("product:{id}", name="product")
def product(id: int) -> dict[str, int]:
    return {"id": id}
