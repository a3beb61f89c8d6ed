"""Logical names meet the mesh: what fits is split, what does not fit is refused or stays whole."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax import sharding
from ldm_jax.errors import InputError
from ldm_jax.sharding import (
    MESH_AXES,
    MeshConfig,
    batch_sharding,
    check_batch,
    constrain,
    host_array,
    make_mesh,
    param_shardings,
    process_slice,
    put_batch,
    replicated,
    spec_for,
    state_shardings,
    use_mesh,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 2, 2))


@pytest.fixture(scope="module")
def fsdp_mesh():
    return make_mesh(MeshConfig(2, 4, 1))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(2, -1, 1), (2, 4, 1)),
        (MeshConfig(2, 2, -1), (2, 2, 2)),
        (MeshConfig(8, -1, 1), (8, 1, 1)),
        (MeshConfig(1, 8, 1), (1, 8, 1)),
    ],
)
def test_mesh_fills_the_axis_of_minus_one(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == MESH_AXES
    assert tuple(mesh.shape.values()) == sizes
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_mesh_over_some_devices_holds_those():
    devices = jax.devices()[2:6]
    assert list(make_mesh(MeshConfig(-1, 2, 1), devices).devices.flat) == devices


@pytest.mark.parametrize(
    ("config", "value", "rule"),
    [
        (MeshConfig(3, 1, 1), "'data': 3", "does not fit 8 devices"),
        (MeshConfig(3, -1, 1), "'data': 3", "does not fit 8 devices"),
        (MeshConfig(2, 2, 1), "'fsdp': 2", "does not fit 8 devices"),
        (MeshConfig(16, 1, 1), "'data': 16", "does not fit 8 devices"),
        (MeshConfig(-1, -1, 1), "'fsdp': -1", "at most one is -1"),
        (MeshConfig(8, 0, 1), "'fsdp': 0", "sizes are positive"),
        (MeshConfig(-1, 1, -2), "'tensor': -2", "sizes are positive"),
    ],
)
def test_mesh_refuses_sizes_that_do_not_fit(config, value, rule):
    with pytest.raises(InputError) as error:
        make_mesh(config)
    message = str(error.value)
    assert value in message and rule in message and "-1" in message
    assert "\n" not in message


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.arange(6.0).reshape(2, 3)
    assert constrain(x, "batch", "channels") is x


def test_constrain_shards_by_name_inside_a_mesh_and_forgets_it_after(mesh):
    def f(x):
        with use_mesh(mesh):
            return constrain(x * 2, "batch", None, "heads")

    x = jnp.arange(32.0).reshape(4, 2, 4)
    y = jax.jit(f)(x)
    want = jax.sharding.NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    assert y.sharding.is_equivalent_to(want, 3)
    np.testing.assert_array_equal(y, x * 2)
    assert constrain(x, "batch", None, "heads") is x


@pytest.mark.parametrize("active", [False, True])
def test_constrain_refuses_unknown_names_and_wrong_counts_with_or_without_a_mesh(mesh, active):
    x = jnp.zeros((2, 3))

    def call(*names):
        if not active:
            return constrain(x, *names)
        with use_mesh(mesh):
            return constrain(x, *names)

    with pytest.raises(ValueError, match=r"unknown logical axis 'tokns'; known: .*'tokens'"):
        call("batch", "tokns")
    with pytest.raises(
        ValueError, match=r"1 axis names \('batch',\) for an array of shape \(2, 3\)"
    ):
        call("batch")


def test_spec_uses_a_mesh_axis_where_it_divides(mesh):
    kernel = (None, None, "in_channels", "out_channels")
    assert spec_for(kernel, (3, 3, 8, 16), mesh) == P(None, None, ("fsdp",), ("tensor",))
    # 7 output channels do not divide by tensor=2: that dimension stays whole.
    assert spec_for(kernel, (3, 3, 8, 7), mesh) == P(None, None, ("fsdp",), None)
    assert spec_for((None,), (8,), mesh) == P(None)


def test_spec_gives_fsdp_to_the_largest_free_dimension_when_its_own_does_not_divide(fsdp_mesh):
    kernel = (None, None, "in_channels", "out_channels")
    # Three image channels do not divide by fsdp=4.
    assert spec_for(kernel, (3, 3, 3, 128), fsdp_mesh) == P(None, None, None, ("fsdp",))
    assert spec_for(("vocab", "in_channels"), (1000, 510), fsdp_mesh) == P(("fsdp",), None)
    assert spec_for(kernel, (4, 4, 3, 128), fsdp_mesh) == P(None, None, None, ("fsdp",))
    # Nothing divides: the parameter stays whole.
    assert spec_for(kernel, (3, 3, 3, 6), fsdp_mesh) == P(None, None, None, None)
    # No dimension asks for fsdp: norms and biases stay whole.
    assert spec_for(("out_channels",), (128,), fsdp_mesh) == P(None)


def test_spec_never_gives_one_mesh_axis_to_two_dimensions(mesh):
    spec = spec_for(("in_channels", "in_channels"), (8, 8), mesh)
    assert spec == P(("fsdp",), None)


def test_axis_of_size_one_leaves_arrays_whole():
    alone = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    assert spec_for(("in_channels", "out_channels"), (8, 8), alone) == P(None, None)


AXES = {
    "dense": {"kernel": ("in_channels", "out_channels"), "bias": ("out_channels",)},
    "norm": {"scale": (None,)},
}


def params():
    return {
        "dense": {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros((6,))},
        "norm": {"scale": jnp.zeros((8,))},
    }


def test_state_shardings_shard_moments_like_parameters_and_replicate_counts(mesh):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1.0))
    )
    shapes = jax.eval_shape(lambda: optimizer.init(params()))
    got = state_shardings(shapes, AXES, mesh)
    want = param_shardings(AXES, params(), mesh)
    assert want["dense"]["kernel"].spec == P(("fsdp",), ("tensor",))
    (adam,) = [s for s in jax.tree.leaves(got, is_leaf=is_adam) if is_adam(s)]
    assert adam.mu == want and adam.nu == want
    counts = [
        s for leaf, s in zip(jax.tree.leaves(shapes), leaves(got), strict=True) if not leaf.ndim
    ]
    assert len(counts) == 2 and all(s == replicated(mesh) for s in counts)


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))


def test_state_shardings_refuse_an_unknown_name(mesh):
    with pytest.raises(ValueError, match="unknown logical axis 'chanels'"):
        state_shardings({"w": jnp.zeros((8,))}, {"w": ("chanels",)}, mesh)


@pytest.mark.parametrize(
    ("batch_size", "nearest"), [(9, 8), (13, 16), (1, 8), (0, 8), (-3, 8), (1201, 1200)]
)
def test_check_batch_names_the_nearest_size_that_divides(mesh, batch_size, nearest):
    wide = make_mesh(MeshConfig(2, 4, 1))
    with pytest.raises(
        InputError, match=rf"batch_size {batch_size} must divide by 8, .*{nearest}$"
    ):
        check_batch(batch_size, wide)
    check_batch(nearest, wide)


def test_check_batch_does_not_count_the_tensor_axis(mesh):
    check_batch(4, mesh)
    with pytest.raises(InputError, match=r"pack 6 must divide by 4, data=2 x fsdp=2 devices; "):
        check_batch(6, mesh, "pack")


def test_process_slice_of_a_process_alone_is_everything(mesh):
    assert process_slice(16, mesh) == (0, 1)
    assert process_slice(16, make_mesh()) == (0, 1)


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([(0, 4), (4, 8)], (0, 2)),
        ([(8, 12), (12, 16)], (1, 2)),
        ([(12, 16), (12, 16)], (3, 4)),  # two devices of a tensor axis hold the same rows
    ],
)
def test_process_slice_counts_the_blocks_of_other_processes(mesh, monkeypatch, rows, want):
    hold(monkeypatch, rows)
    assert process_slice(16, mesh) == want


@pytest.mark.parametrize("rows", [[(0, 4), (8, 12)], [(4, 8), (8, 12)]])
def test_process_slice_refuses_rows_that_are_not_one_aligned_block(mesh, monkeypatch, rows):
    hold(monkeypatch, rows)
    with pytest.raises(InputError, match=r"\(8, 12\).*must be one aligned block"):
        process_slice(16, mesh)


def hold(monkeypatch, rows):
    """Lets this process hold `rows` of a batch, as one of several processes would."""
    held = {i: (slice(a, b, None),) for i, (a, b) in enumerate(rows)}
    fake = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: held)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: fake)


@pytest.mark.parametrize("config", [MeshConfig(8, 1, 1), MeshConfig(2, 4, 1), MeshConfig(2, 2, 2)])
def test_put_batch_then_host_array_is_the_identity_and_really_splits(config):
    mesh = make_mesh(config)
    batch = {
        "image": np.arange(16 * 12, dtype=np.uint8).reshape(16, 2, 2, 3),
        "label": np.arange(16, dtype=np.int32),
    }
    placed = put_batch(batch, mesh, 16)
    ways = config.data * config.fsdp
    for name, array in placed.items():
        assert array.sharding.is_equivalent_to(batch_sharding(mesh), array.ndim)
        assert {s.data.shape[0] for s in array.addressable_shards} == {16 // ways}
        assert array.dtype == batch[name].dtype
        np.testing.assert_array_equal(host_array(array), batch[name])


def test_host_array_joins_what_is_sharded_over_parameters(mesh):
    x = np.arange(48.0, dtype=np.float32).reshape(8, 6)
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("fsdp", "tensor")))
    np.testing.assert_array_equal(host_array(placed), x)
