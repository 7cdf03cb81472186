"""What is compiled once is there for every engine of these tests: programs depend on shapes, weights are arguments."""

import pytest

from glmjax.kept_programs import described
from glmjax.serving.compiled import Programs
from tests.mapped_memory import crowded


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    program, found = Programs._program, {}

    def once(self, name, cache, state):
        run, how, donated, arguments = self._parts(name, cache, state)
        key = run, *how.items(), donated, described(arguments)
        if key not in found:
            found[key] = program(self, name, cache, state)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "_program", once)
        yield found


@pytest.fixture(scope="module", autouse=True)
def room_for_programs_of_engines(compiled_once):
    yield
    if crowded():
        compiled_once.clear()
