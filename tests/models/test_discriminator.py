"""The patch discriminator: its size, what it starts from, what it sees, and its norms' laws."""

import functools

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import discriminator
from ldm_jax.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh

CONFIGS = {
    norm: discriminator.DiscriminatorConfig(
        width=4, num_layers=2, norm=norm, compute_dtype="float32"
    )
    for norm in discriminator.NORMS
}
X = np.tanh(np.random.default_rng(0).standard_normal((8, 16, 16, 3), np.float32))


@functools.cache
def params(norm):
    return drawn(CONFIGS[norm])


def drawn(config):
    return jax.jit(functools.partial(discriminator.init, config))(jax.random.key(1))


def shapes(config):
    return jax.eval_shape(lambda: discriminator.init(config, jax.random.key(0)))


@functools.cache
def applied(norm):
    return jax.jit(functools.partial(discriminator.apply, CONFIGS[norm]))


@functools.cache
def started():
    return jax.jit(functools.partial(discriminator.start_act_norm, CONFIGS["act"]))


@pytest.mark.parametrize(("num_layers", "count"), [(3, 2_765_633), (2, 663_361)])
def test_parameter_counts_are_the_published_ones(num_layers, count):
    ours = shapes(discriminator.DiscriminatorConfig(num_layers=num_layers))
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == count


def test_widths_stop_doubling_at_eightfold():
    ours = shapes(discriminator.DiscriminatorConfig(num_layers=5))
    widths = [ours[f"conv{i}"]["kernel"].shape[-1] for i in range(6)]
    assert widths == [64, 128, 256, 512, 512, 512]


def test_every_parameter_starts_from_its_published_law():
    ours = jax.tree.map(np.asarray, drawn(discriminator.DiscriminatorConfig(num_layers=2)))
    for name, p in ours.items():
        kernel = p["kernel"]
        tolerance = 4 / kernel.size**0.5  # four standard errors
        assert abs(kernel.mean()) < 0.02 * tolerance, name
        assert abs(kernel.std() / 0.02 - 1) < tolerance, name
        # A normal law, not another of the same deviation: kurtosis 3, of the uniform 1.8.
        assert abs((kernel**4).mean() / 0.02**4 - 3) < 10 * tolerance, name
        if "norm" in p:
            assert set(p) == {"kernel", "norm"}
            scale = p["norm"]["scale"]
            assert abs(scale.mean() - 1) < 4 * 0.02 / scale.size**0.5
            assert abs(scale.std() / 0.02 - 1) < 4 / scale.size**0.5
            np.testing.assert_array_equal(p["norm"]["bias"], 0)
        else:
            bound = (16 * kernel.shape[2]) ** -0.5
            assert 0 < np.abs(p["bias"]).max() <= bound
    assert np.abs(ours["conv0"]["bias"]).max() > 0.8 * (16 * 3) ** -0.5


@pytest.mark.parametrize("norm", discriminator.NORMS)
def test_axes_name_every_dimension(norm):
    names = discriminator.axes(CONFIGS[norm])
    jax.tree.map(
        lambda n, p: pytest.fail(f"{n} {p.shape}") if len(n) != len(p.shape) else None,
        names,
        shapes(CONFIGS[norm]),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize(("num_layers", "sees"), [(2, 34), (3, 70)])
def test_a_logit_sees_as_many_pixels_as_published(num_layers, sees):
    """Without norms, the gradient of one logit lies on a square of the image and fills it."""
    config = discriminator.DiscriminatorConfig(width=2, num_layers=num_layers, norm="none")
    # Positive weights and activations, so that no path is cut and none cancels.
    ours = jax.tree.map(lambda s: np.full(s.shape, 0.01, np.float32), shapes(config))
    side = 96
    x = np.ones((1, side, side, 3), np.float32)

    def middle(x):
        logits, statistics = discriminator.apply(config, ours, x)
        assert logits.shape[1] == side // 2**num_layers - 2
        assert statistics == {} == discriminator.init_statistics(config)
        return logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]

    support = np.asarray(jax.jit(jax.grad(middle))(x))[0].sum(-1) != 0
    rows, columns = np.nonzero(support.any(1))[0], np.nonzero(support.any(0))[0]
    assert len(rows) == len(columns) == sees
    assert support[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert rows[0] > 0
    assert rows[-1] < side - 1  # none of it is cut off by the border


def test_batch_norm_forgets_the_scale_and_shift_of_what_it_normalises():
    """A kernel ten times as large, batch norm behind it, gives the same logits."""
    p = params("batch")
    larger = p | {"conv1": p["conv1"] | {"kernel": 10 * p["conv1"]["kernel"]}}
    ours, statistics = applied("batch")(p, X)
    theirs, of_larger = applied("batch")(larger, X)
    np.testing.assert_allclose(ours, theirs, rtol=5e-3, atol=5e-3)  # epsilon is not scaled
    mean = statistics["conv1"]["mean"]
    np.testing.assert_allclose(10 * mean, of_larger["conv1"]["mean"], rtol=1e-3, atol=1e-6)


def test_running_statistics_are_a_moving_average_of_momentum_a_tenth():
    p, x = jax.tree.map(np.asarray, params("batch")), X + 1
    _, batch = applied("batch")(p, x)
    h = _conv(x, p["conv0"]["kernel"], 2) + p["conv0"]["bias"].reshape(1, 1, 1, -1)
    h = _conv(np.where(h > 0, h, 0.2 * h), p["conv1"]["kernel"], 2)
    np.testing.assert_allclose(batch["conv1"]["mean"], h.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch["conv1"]["variance"], h.var((0, 1, 2), ddof=1), rtol=1e-4)
    running = start = discriminator.init_statistics(CONFIGS["batch"])
    assert jax.tree.structure(running) == jax.tree.structure(batch)
    for _ in range(3):
        running = discriminator.update_statistics(running, batch)
    for name, b in batch.items():
        for kind in ("mean", "variance"):
            expected = 0.9**3 * start[name][kind] + (1 - 0.9**3) * b[kind]
            np.testing.assert_allclose(running[name][kind], expected, rtol=1e-5, atol=1e-7)


def test_batch_norm_over_a_mesh_takes_the_statistics_of_the_whole_batch():
    config, mesh = CONFIGS["batch"], make_mesh(MeshConfig(data=4, fsdp=2))

    @functools.partial(jax.jit, in_shardings=(None, batch_sharding(mesh)))
    def over_mesh(p, x):
        with use_mesh(mesh):
            return discriminator.apply(config, p, x)

    x = X * np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)  # unlike on every device
    whole = applied("batch")(params("batch"), x)
    for a, b in zip(
        jax.tree.leaves(whole), jax.tree.leaves(over_mesh(params("batch"), x)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_act_norm_starts_at_mean_zero_and_deviation_one():
    x = 3 * X + 0.5
    begun = started()(params("act"), x)
    assert jax.tree.structure(begun) == jax.tree.structure(params("act"))
    for name, p in begun.items():
        for part, value in p.items():
            if part != "norm":
                np.testing.assert_array_equal(value, params("act")[name][part])
    # By hand: the first normed layer, then what it leaves to the second.
    begun = jax.tree.map(np.asarray, begun)
    h = _conv(x, begun["conv0"]["kernel"], 2) + begun["conv0"]["bias"].reshape(1, 1, 1, -1)
    for name, stride in (("conv1", 2), ("conv2", 1)):
        h = _conv(np.where(h > 0, h, 0.2 * h), begun[name]["kernel"], stride)
        row = {k: v.reshape(1, 1, 1, -1) for k, v in begun[name]["norm"].items()}
        h = row["scale"] * (h + row["bias"])
        np.testing.assert_allclose(h.mean((0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(h.std((0, 1, 2), ddof=1), 1, rtol=1e-3)
    h = _conv(np.where(h > 0, h, 0.2 * h), begun["logits"]["kernel"], 1) + begun["logits"]["bias"]
    np.testing.assert_allclose(applied("act")(begun, x)[0], h, rtol=1e-4, atol=1e-4)


def test_act_norm_that_is_started_no_longer_looks_at_the_batch():
    begun = started()(params("act"), X)
    whole, statistics = applied("act")(begun, X)
    assert statistics == {}
    shuffled, _ = applied("act")(begun, np.concatenate([X[:1], X[:7]]))
    np.testing.assert_allclose(shuffled[1:], whole[:7], rtol=1e-5, atol=1e-6)


def _conv(x, kernel, stride):
    padding, layout = ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=layout)
    return np.asarray(h)


@pytest.mark.parametrize(
    "fields", [dict(norm="layer"), dict(width=0), dict(num_layers=0), dict(compute_dtype="fp16")]
)
def test_a_configuration_that_cannot_be_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        discriminator.DiscriminatorConfig(**fields)
