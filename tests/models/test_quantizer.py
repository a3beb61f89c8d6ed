"""Vector quantisation: nearest codes, whose gradient goes where, and the codebook's upkeep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.errors import InputError
from ldm_jax.models import quantizer
from ldm_jax.sharding import MeshConfig, batch_sharding, make_mesh

N, C = 12, 3
RNG = np.random.default_rng(0)
CODEBOOK = RNG.standard_normal((N, C), np.float32)
Z = RNG.standard_normal((8, 4, 4, C), np.float32)
nearest = jax.jit(quantizer.nearest)


def brute_force(codebook, z):
    """Squared distances [B,h,w,n] in f64."""
    difference = z[..., None, :].astype(np.float64) - codebook.astype(np.float64)
    return np.square(difference).sum(-1)


@pytest.mark.parametrize("n", [N, quantizer.CHUNK, 2 * quantizer.CHUNK + 37])
def test_nearest_is_brute_force(n):
    codebook = np.random.default_rng(1).standard_normal((n, C), np.float32)
    indices = nearest(codebook, Z)
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, brute_force(codebook, Z).argmin(-1))
    assert n == N or np.unique(indices).max() > n - n // 3  # late codes are among the answers


def test_nearest_of_equals_is_the_first_and_padding_is_none():
    """Whole numbers, so that equal distances are equal; copies lie in every chunk."""
    codes = np.random.default_rng(2).integers(-2, 3, (40, C)).astype(np.float32) + 5
    codebook = np.tile(codes, (2 * quantizer.CHUNK // 40 + 2, 1))
    assert len(codebook) % quantizer.CHUNK
    z = np.round(2 * Z)  # the zeros that pad a chunk would be nearer than any code
    indices = nearest(codebook, z)
    np.testing.assert_array_equal(indices, brute_force(codebook, z).argmin(-1))
    assert indices.max() < 40


def test_straight_through_has_the_value_of_codes_and_the_gradient_of_latents():
    @jax.jit
    def answers(z, codebook, cotangent):
        def value(z, codebook):
            return quantizer.straight_through(z, quantizer.quantize(codebook, z)[0])

        out, pullback = jax.vjp(value, z, codebook)
        return out, *pullback(cotangent)

    cotangent = np.random.default_rng(3).standard_normal(Z.shape, np.float32)
    out, to_z, to_codebook = answers(Z, CODEBOOK, cotangent)
    np.testing.assert_allclose(out, CODEBOOK[nearest(CODEBOOK, Z)], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(to_z, cotangent)
    np.testing.assert_array_equal(to_codebook, 0)


LOSSES = {  # (weight of the commitment, weight of the codebook's term)
    "published": (dict(legacy_beta=True), 1.0, 0.3),
    "corrected": (dict(legacy_beta=False), 0.3, 1.0),
    "average, published": (dict(legacy_beta=True, average_decay=0.9), 1.0, 0.0),
    "average, corrected": (dict(legacy_beta=False, average_decay=0.9), 0.3, 0.0),
}


@pytest.mark.parametrize(("fields", "commitment", "of_codes"), LOSSES.values(), ids=LOSSES)
def test_loss_and_its_gradients_are_the_closed_form(fields, commitment, of_codes):
    config = quantizer.QuantizerConfig(codebook_size=N, beta=0.3, **fields)

    def loss(z, codebook):
        return quantizer.loss(config, z, quantizer.quantize(codebook, z)[0])

    value, (to_z, to_codebook) = jax.jit(jax.value_and_grad(loss, (0, 1)))(Z, CODEBOOK)
    indices = brute_force(CODEBOOK, Z).argmin(-1)
    difference = Z - CODEBOOK[indices]
    np.testing.assert_allclose(
        value, (commitment + of_codes) * np.square(difference).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(to_z, commitment * 2 * difference / Z.size, rtol=1e-5, atol=1e-8)
    by_code = np.zeros((N, C))
    np.add.at(by_code, indices, -of_codes * 2 * difference / Z.size)
    np.testing.assert_allclose(to_codebook, by_code, rtol=1e-5, atol=1e-8)


def test_perplexity_counts_the_codes_in_equal_use():
    usage_of = jax.jit(functools.partial(quantizer.usage, codebook_size=8))
    for used in (8, 4, 1):
        usage = usage_of(np.arange(64, dtype=np.int32).reshape(4, 4, 4) % used)
        np.testing.assert_allclose(usage["perplexity"], used, rtol=1e-5)
        np.testing.assert_allclose(usage["codes_used"], used / 8)
    uneven = usage_of(np.int32([0, 0, 0, 1] * 16).reshape(4, 4, 4))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(uneven["perplexity"], np.exp(entropy), rtol=1e-5)


@functools.cache
def upkeep(config):
    """One step of upkeep, compiled: (codebook, carried, z, indices, key)."""
    return jax.jit(functools.partial(quantizer.upkeep, config))


AVERAGE = quantizer.QuantizerConfig(codebook_size=N, average_decay=0.9)
RESTART = quantizer.QuantizerConfig(codebook_size=N, restart_below=0.5)
BOTH = quantizer.QuantizerConfig(codebook_size=N, average_decay=0.9, restart_below=0.5)


def test_moving_average_is_the_closed_form():
    """Three steps with the same latents and codes; every sum is geometric."""
    codebook, carried = CODEBOOK, quantizer.start_counts(jnp.asarray(CODEBOOK))
    indices = brute_force(CODEBOOK, Z).argmin(-1).astype(np.int32)
    indices[indices == 5] = 4  # a code that nothing uses
    for step in range(3):
        codebook, carried = upkeep(AVERAGE)(codebook, carried, Z, indices, jax.random.key(step))
    uses = np.bincount(indices.reshape(-1), minlength=N)
    sums = np.zeros((N, C))
    np.add.at(sums, indices, Z)
    old = 0.9**3
    count, total = old + (1 - old) * uses, old * CODEBOOK + (1 - old) * sums
    np.testing.assert_allclose(carried["count"], count, rtol=1e-5)
    np.testing.assert_allclose(carried["sum"], total, rtol=1e-5, atol=1e-5)
    # But for the smoothing, each code is the mean of what it has stood for.
    np.testing.assert_allclose(codebook, total / count[:, None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(codebook[5], CODEBOOK[5], rtol=1e-4)


def test_smoothing_keeps_a_vanishing_count_from_dividing_noise():
    """Code 0 has every latent, code 1 next to nothing, the others nothing at all."""
    count, total = np.zeros(N, np.float32), np.zeros((N, C), np.float32)
    count[:2], total[:2] = (1.0, 1e-8), [[2.0], [1e-6]]
    indices = np.zeros(Z.shape[:3], np.int32)
    carried = {"count": count, "sum": total}
    codebook, _ = upkeep(AVERAGE)(CODEBOOK, carried, 0 * Z + 2, indices, jax.random.key(0))
    np.testing.assert_allclose(codebook[0], 2.0, rtol=1e-4)
    np.testing.assert_allclose(codebook[1], 0.9e-6 / (0.9e-8 + 1e-5), rtol=1e-3)  # not 100
    np.testing.assert_array_equal(codebook[2:], 0)


def test_smoothed_counts_add_up_to_the_counts():
    """(N_i + 1e-5) / (N + K 1e-5) N, as published (van den Oord et al., 2017, in its code)."""
    carried = {"count": jnp.zeros(N), "sum": jnp.ones((N, C))}
    one, index = jnp.full((1, 1, 1, C), 2.0), jnp.zeros((1, 1, 1), jnp.int32)
    codebook, carried = upkeep(AVERAGE)(CODEBOOK, carried, one, index, jax.random.key(0))
    smooth = np.float64(carried["sum"]) / codebook
    np.testing.assert_allclose(smooth.sum(0), 0.1, rtol=1e-4)
    np.testing.assert_allclose(smooth[1:], 1e-5 / (0.1 + 12e-5) * 0.1, rtol=1e-4)


def test_upkeep_without_an_average_leaves_the_codebook_alone():
    indices = nearest(CODEBOOK, Z)
    carried = {"count": jnp.full(N, 9.0), "sum": jnp.zeros((N, C))}
    codebook, carried = upkeep(RESTART)(CODEBOOK, carried, Z, indices, jax.random.key(0))
    np.testing.assert_array_equal(codebook, CODEBOOK)
    uses = np.bincount(np.ravel(indices), minlength=N)
    np.testing.assert_allclose(carried["count"], 0.99 * 9 + 0.01 * uses, rtol=1e-5)


@pytest.mark.parametrize("config", [RESTART, BOTH], ids=["by gradient", "by average"])
def test_idle_codes_are_put_on_latents_of_the_batch(config):
    decay = config.average_decay or 0.99
    indices = np.asarray(nearest(CODEBOOK[:4], Z))  # of twelve codes four are used
    count = np.full(N, 2.0, np.float32)
    count[6:] = 0.4
    carried = {"count": count, "sum": count[:, None] * CODEBOOK}
    codebook, after = upkeep(config)(CODEBOOK, carried, Z, indices, jax.random.key(7))
    latents = {tuple(z) for z in Z.reshape(-1, C)}
    restarted = [tuple(code) in latents for code in np.asarray(codebook)]
    assert restarted == [False] * 6 + [True] * 6
    assert len({tuple(code) for code in np.asarray(codebook[6:])}) > 3  # not one latent for all
    np.testing.assert_allclose(after["count"][6:], 2 * config.restart_below)
    np.testing.assert_allclose(after["sum"][6:], after["count"][6:, None] * codebook[6:], rtol=1e-6)
    np.testing.assert_allclose(after["count"][4:6], 2 * decay, rtol=1e-5)
    other, _ = upkeep(config)(CODEBOOK, carried, Z, indices, jax.random.key(8))
    assert (np.asarray(other)[6:] != np.asarray(codebook)[6:]).any()
    np.testing.assert_array_equal(other[:6], codebook[:6])


def test_a_restarted_code_that_nothing_uses_is_given_time():
    indices = np.zeros(Z.shape[:3], np.int32)
    codebook, carried = CODEBOOK, {"count": np.zeros(N), "sum": np.zeros((N, C))}
    carried = jax.tree.map(np.float32, carried)
    moved = []
    for step in range(15):
        new, carried = upkeep(BOTH)(codebook, carried, Z, indices, jax.random.key(step))
        moved.append(bool(np.abs(new[1:] - codebook[1:]).max() > 1e-3))
        codebook = new
    # 2 * 0.9**n falls below 1 at n = 7.
    assert [step for step, m in enumerate(moved) if m] == [0, 7, 14]


def test_a_sharded_batch_gives_what_one_device_gives():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    whole = NamedSharding(mesh, PartitionSpec())
    config = quantizer.QuantizerConfig(codebook_size=N, average_decay=0.9, restart_below=1.0)

    def step(codebook, carried, z, key):
        z_q, indices = quantizer.quantize(codebook, z)
        codebook, carried = quantizer.upkeep(config, codebook, carried, z, indices, key)
        loss = quantizer.loss(config, z, z_q)
        return indices, codebook, carried, loss, quantizer.usage(indices, N)

    far = CODEBOOK + 9 * (np.arange(N) > 8).astype(np.float32).reshape(-1, 1)  # some stay idle
    carried = quantizer.start_counts(jnp.asarray(far))
    one = jax.jit(step)(far, carried, Z, jax.random.key(0))
    sharded = jax.jit(step, in_shardings=(whole, whole, batch_sharding(mesh), whole))
    many = sharded(far, carried, Z, jax.random.key(0))
    assert (np.abs(one[1][9:]) < 5).all()  # those have been restarted
    np.testing.assert_array_equal(one[0], many[0])
    for a, b in zip(jax.tree.leaves(one[1:]), jax.tree.leaves(many[1:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        dict(codebook_size=1),
        dict(beta=-1.0),
        dict(restart_below=float("inf")),
        dict(average_decay=1.0),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        quantizer.QuantizerConfig(**fields)
