"""What is compiled once is there for every engine of these tests: programs depend on shapes, weights are arguments."""

import jax
import pytest

from glmjax.serving.compiled import Programs
from tests.mapped_memory import crowded


class Once:
    """What is lowered, when it is asked for; compiled once."""

    def __init__(self, lower, key, found):
        self._lower, self._key, self._found = lower, key, found

    def compile(self):
        if self._key not in self._found:
            self._found[self._key] = self._lower().compile()
        return self._found[self._key]

    def __getattr__(self, name):
        return getattr(self._lower(), name)


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    lowered, found = Programs._lowered, {}

    def once(self, name, cache, state):
        leaves, structure = jax.tree.flatten((self._leaves, cache, state))
        sizes = self._most_rounds, self._most_retired, self._stop_ids
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = name, sizes, self._hooks, self._structure, structure, shapes
        return Once(lambda: lowered(self, name, cache, state), key, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "_lowered", once)
        yield found


@pytest.fixture(scope="module", autouse=True)
def room_for_programs_of_engines(compiled_once):
    yield
    if crowded():
        compiled_once.clear()
