"""Which implementation of an op runs: by device, by environment, by context."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh

from glmjax.pallas import dispatch


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def gpu(kind):
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 132, "cuda")))


@pytest.fixture
def op(monkeypatch):
    """An op that returns 1 where its reference runs and 2 where its kernel does; the kernel takes even widths only."""
    module = SimpleNamespace(supports=lambda x: x.shape[-1] % 2 == 0, mosaic=lambda x: 2)
    monkeypatch.setitem(sys.modules, "fake_kernel", module)
    return lambda x: dispatch.choose(lambda x: 1, mosaic="fake_kernel")(x)


def test_the_reference_runs_on_the_cpu():
    assert dispatch.current() == "reference"


def test_without_a_kernel_chosen_its_module_is_not_imported():
    assert dispatch.choose(abs, mosaic="no.such.module") is abs


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        ("NVIDIA H200", "mosaic"),
        ("NVIDIA H100 80GB HBM3", "mosaic"),
        ("NVIDIA GH200 480GB", "mosaic"),
        ("NVIDIA H20", "mosaic"),
        ("NVIDIA A100-SXM4-80GB", "reference"),
        ("NVIDIA B200", "reference"),
        ("NVIDIA GB200", "reference"),
        ("NVIDIA GeForce RTX 4090", "reference"),
        ("cpu", "reference"),
        ("TPU v5 lite", "reference"),
    ],
)
def test_the_kernel_runs_on_hopper_also_when_the_gpu_is_abstract(kind, chosen):
    with gpu(kind):
        assert dispatch.current() == chosen
        traced = []
        jax.jit(lambda x: traced.append(dispatch.current()) or x).trace(1.0)
    assert traced == [chosen]


@pytest.mark.parametrize(("capability", "hopper"), [("9.0", True), ("8.9", False), ("10.0", False), ("gfx942", False)])
def test_a_device_that_tells_its_compute_capability_is_believed(capability, hopper):
    assert dispatch.is_hopper(SimpleNamespace(compute_capability=capability, device_kind="NVIDIA H200")) is hopper


def test_a_kernel_runs_only_what_it_supports(op):
    with gpu("NVIDIA H200"):
        assert op(jnp.zeros((3, 4))) == 2
        assert op(jnp.zeros((3, 5))) == 1


def test_the_environment_overrides_the_device(op, monkeypatch):
    monkeypatch.setenv("GLMJAX_OPS", "mosaic")
    assert op(jnp.zeros(2)) == 2
    monkeypatch.setenv("GLMJAX_OPS", "reference")
    with gpu("NVIDIA H200"):
        assert op(jnp.zeros(2)) == 1


def test_the_context_overrides_the_environment_and_nests(monkeypatch):
    monkeypatch.setenv("GLMJAX_OPS", "mosaic")
    with dispatch.implementation("reference"):
        assert dispatch.current() == "reference"
        with dispatch.implementation("mosaic"):
            assert dispatch.current() == "mosaic"
        assert dispatch.current() == "reference"
    assert dispatch.current() == "mosaic"


def test_the_context_ends_with_an_exception_in_it():
    with pytest.raises(KeyError), dispatch.implementation("mosaic"):
        raise KeyError
    assert dispatch.current() == "reference"


def test_a_jitted_function_is_traced_again_for_another_implementation(op):
    f = jax.jit(lambda x: x + op(x))
    assert f(jnp.zeros(2))[0] == 1
    with dispatch.implementation("mosaic"):
        assert f(jnp.zeros(2))[0] == 2
    assert f(jnp.zeros(2))[0] == 1
    assert f._cache_size() == 2


def test_unknown_implementations_are_refused_with_those_that_exist(monkeypatch):
    with pytest.raises(ValueError, match="implementation is 'triton'; it must be one of: reference, mosaic"):
        dispatch.implementation("triton")
    monkeypatch.setenv("GLMJAX_OPS", "Mosaic")
    with pytest.raises(ValueError, match="GLMJAX_OPS is 'Mosaic'; it must be one of: reference, mosaic"):
        dispatch.current()


def test_under_shard_map_a_kernel_may_type_its_result_by_any_of_its_arrays(monkeypatch):
    seen = {}

    def mosaic(x, weights, *, scale):
        seen.update(x=jax.typeof(x).manual_axis_type.varying, w=jax.typeof(weights["w"]).manual_axis_type.varying)
        return x * weights["w"] * scale

    monkeypatch.setitem(sys.modules, "fake_kernel", SimpleNamespace(supports=lambda *_, **__: True, mosaic=mosaic))
    mesh = jax.make_mesh((1,), ("role",), axis_types=(jax.sharding.AxisType.Auto,))
    split = PartitionSpec("role")

    def op(x, weights):
        return dispatch.choose(mosaic, mosaic="fake_kernel")(x, weights, scale=2.0)

    with dispatch.implementation("mosaic"):
        f = jax.shard_map(op, mesh=mesh, in_specs=(PartitionSpec(), {"w": split}), out_specs=split)
        np.testing.assert_array_equal(f(jnp.ones(4), {"w": jnp.full(4, 3.0)}), np.full(4, 6.0))
    assert seen == {"x": {"role"}, "w": {"role"}}
