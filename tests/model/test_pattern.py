"""The layer pattern: every layer once and in order, with as few traced layers as periods allow."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.model.config import GlmConfig
from glmjax.model.pattern import LayerIndex, Segment, layer_indices, mtp_index, segments

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = {"D": ("dense", "full"), "d": ("dense", "shared"), "S": ("sparse", "full"), "s": ("sparse", "shared")}
"""A letter per kind of layer: the MLP's initial, a capital where the layer has its own indexer."""


@functools.cache
def tiny() -> GlmConfig:
    return GlmConfig.from_dir(CONFIGS / "nano.json")


def of(letters: str) -> GlmConfig:
    """A configuration with these layers."""
    mlps, indexers = zip(*(NAMES[letter] for letter in letters), strict=True)
    raw = {field: getattr(tiny(), field) for field in tiny().__dataclass_fields__}
    raw |= {"num_hidden_layers": len(letters), "mlp_layer_types": mlps, "indexer_types": indexers}
    return GlmConfig(**raw)


def layers_of(cover: tuple[Segment, ...]) -> tuple[LayerIndex, ...]:
    return tuple(index for segment in cover for n in range(segment.repeats) for index in segment.at(n))


def traced(cover: tuple[Segment, ...]) -> int:
    return sum(len(segment.first) for segment in cover)


def shape(cover: tuple[Segment, ...]) -> list[tuple[int, int]]:
    """(layers of a period, repeats) per segment."""
    return [(len(segment.first), segment.repeats) for segment in cover]


def fewest_traced(letters: str) -> int:
    """The least number of traced layers, by trying every way to cut."""

    @functools.cache
    def of_rest(start: int) -> int:
        if start == len(letters):
            return 0
        costs = []
        for end in range(start + 1, len(letters) + 1):
            part = letters[start:end]
            period = next(p for p in range(1, len(part) + 1) if part == part[:p] * (len(part) // p))
            costs.append(period + of_rest(end))
        return min(costs)

    return of_rest(0)


unhurried = settings(max_examples=60, deadline=None)  # the machine may be busy
patterns = st.text("DdSs", min_size=1, max_size=24).map(lambda text: text[0].upper() + text[1:])
periodic = st.builds(
    lambda parts: (lambda text: text[0].upper() + text[1:])("".join(period * times for period, times in parts)),
    st.lists(st.tuples(st.text("DSs", min_size=1, max_size=4), st.integers(1, 6)), min_size=1, max_size=3),
)


@given(patterns | periodic)
@unhurried
def test_every_layer_once_and_in_order(letters):
    config = of(letters)
    assert layers_of(segments(config)) == layer_indices(config)


@given(patterns | periodic)
@unhurried
def test_no_cover_by_periods_traces_fewer_layers(letters):
    assert traced(segments(of(letters))) == fewest_traced(letters)


@given(patterns)
@unhurried
def test_ordinals_count_the_layers_of_a_kind(letters):
    config = of(letters)
    indices = layer_indices(config)
    assert [i.layer for i in indices] == list(range(len(letters)))
    assert [(i.mlp, i.indexer) for i in indices] == [NAMES[letter] for letter in letters]
    for mlp in ("dense", "sparse"):
        own = [i.mlp_ordinal for i in indices if i.mlp == mlp]
        assert own == list(range(config.mlp_layer_types.count(mlp)))
    own = [i.index_ordinal for i in indices if i.indexer == "full"]
    assert own == list(range(config.indexer_types.count("full")))


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("D", [(1, 1)]),
        ("S", [(1, 1)]),
        ("S" * 7, [(1, 7)]),
        ("Ds", [(2, 1)]),
        ("DS" * 5, [(2, 5)]),
        ("SsssSsssSsss", [(4, 3)]),
        ("DSSSS", [(1, 1), (1, 4)]),  # the nano model
        ("D" * 3 + "S" * 75, [(1, 3), (1, 75)]),  # GLM-5, GLM-5.1
        ("DDD" + "sss" + "Ssss" * 18, [(1, 3), (1, 3), (4, 18)]),  # GLM-5.2
    ],
)
def test_known_patterns(letters, expected):
    cover = segments(of(letters))
    assert shape(cover) == expected
    assert layers_of(cover) == layer_indices(of(letters))


@pytest.mark.parametrize(("name", "layers"), [("nano", 2), ("glm-5", 2), ("glm-5.1", 2), ("glm-5.2", 6)])
def test_traced_layers_of_the_published_models(name, layers):
    config = GlmConfig.from_dir(CONFIGS / f"{name}.json")
    cover = segments(config)
    assert traced(cover) == layers
    assert layers_of(cover) == layer_indices(config)


def test_tracing_does_not_grow_with_depth():
    assert [traced(segments(of("DDDsss" + "Ssss" * periods))) for periods in (2, 10, 60)] == [6, 6, 6]


def test_equal_configurations_share_their_cover():
    assert segments(of("DSS")) is segments(of("DSS"))


def test_a_traced_period_number_gives_traced_ordinals():
    segment = segments(of("DDD" + "sssS" * 3))[1]

    @jax.jit
    def ordinals(n):
        return [(i.layer, i.mlp_ordinal, i.index_ordinal) for i in segment.at(n)]

    expected = [(i.layer, i.mlp_ordinal, i.index_ordinal) for i in segment.at(2)]
    assert jax.tree.map(int, ordinals(jnp.int32(2))) == expected


@given(patterns)
@unhurried
def test_the_mtp_layer_comes_after_the_last_of_every_stack(letters):
    config = of(letters)
    index = mtp_index(config)
    assert (index.mlp, index.indexer) == ("sparse", "full")
    assert index.layer == len(letters)
    assert index.mlp_ordinal == config.mlp_layer_types.count("sparse")
    assert index.index_ordinal == config.indexer_types.count("full")


def test_the_mtp_layer_of_glm_5_2_is_layer_78_with_experts_75_and_indexer_21():
    index = mtp_index(GlmConfig.from_dir(CONFIGS / "glm-5.2.json"))
    assert (index.layer, index.mlp_ordinal, index.index_ordinal) == (78, 75, 21)
