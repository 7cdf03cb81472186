"""Whatever happens to pages, no token is wrong, no row, and nothing is lost; and what would go wrong would be found."""

import dataclasses
from unittest import mock

import hypothesis
import jax.numpy as jnp
import pytest

from glmjax import speculation
from glmjax.serving import pages, programs
from glmjax.serving.pages import land
from glmjax.speculation import verify
from tests.serving.hash_network import CONFIG, Oracle
from tests.serving.machine import PROGRAMS, A, Machine, jitted
from tests.serving.races import Races, race


def test_no_token_and_no_row_is_ever_wrong():
    race()


def test_drafts_beyond_a_sequences_pages_see_nobody_elses_rows():
    """The last row of the last page, another round: what would follow stands in no page, least of all in page 0."""
    machine = Machine()
    machine.end(machine.start([1]))  # page 0 holds what nobody knows
    sequence = machine.start([2])
    machine.read([sequence])
    machine.decode([sequence])
    assert sequence.ids == [2, *Oracle([2]).following(A)]


# What is planted


def commits_nothing(model, cache, *_):
    return cache


def writes_below(model, state, *chain, **given):
    """As `verify`, and a row of the token before the chain's first."""
    out = verify(model, state, *chain, **given)
    step = out.state.cache.step(state.position_B[:, None] - 1)
    rows_B1C = jnp.ones((*step.positions_BT.shape, CONFIG.cache_row_dim))
    return out._replace(state=dataclasses.replace(out.state, cache=out.state.cache.append(1, rows_B1C, step)))


def forgets_the_room(model, state, *chain, room_B, **given):
    return verify(model, state, *chain, **given)


def trusts_everybody(cache, *moved):
    landed, ok_Z = land(dataclasses.replace(cache, versioned=False), *moved)
    return dataclasses.replace(landed, versioned=True), ok_Z


WRONG = "a wrong row|a wrong token|gaps do not tell"
"""Whichever is looked at first."""


@pytest.mark.parametrize(
    ("program", "planted", "found"),
    [
        ("decode 0", mock.patch.object(programs, "commit", commits_nothing), WRONG),
        ("decode 2", mock.patch.object(speculation, "commit", commits_nothing), WRONG),
        ("decode 2", mock.patch.object(pages, "verdict", lambda *given: jnp.zeros_like(given[2])), None),
        ("verify", mock.patch.object(speculation, "commit", commits_nothing), WRONG),
        ("verify", mock.patch.object(programs, "verify", writes_below), WRONG),
        ("verify", mock.patch.object(programs, "verify", forgets_the_room), WRONG),
        ("land", lambda _: trusts_everybody, "landed at another's"),
    ],
    ids=[
        "MTP rows are not written after a dispatch without drafts",
        "MTP rows of drafts are not written again",
        "nobody looks at versions",
        "MTP rows of a chain are not written",
        "a chain writes a row below what is ready",
        "a chain goes beyond its pages",
        "what lands late lands",
    ],
)
def test_what_is_planted_is_found(program, planted, found):
    class Planted(Races):
        programs = PROGRAMS | {program: jitted(program, planted)}

    with pytest.raises(AssertionError, match=found):
        race(Planted, max_examples=1000, phases=[hypothesis.Phase.generate], database=None)
