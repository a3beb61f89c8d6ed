"""Laws of the latent perceptual loss, its outlier mask, its gate and its choice of rows."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.noise_levels import NoiseLevels, draw_times
from ldm_jax.diffusion.perceptual import (
    NORMALISERS,
    PENALTIES,
    PerceptualConfig,
    capacity,
    choose_rows,
    distance,
    gated_share,
    inliers,
    noise_ratio,
    perceptual_loss,
    tap_indices,
)
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for

CONFIG = PerceptualConfig()
PLAIN = PerceptualConfig(normaliser="none", mask=False, depth_weights="uniform")


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_(**fields):
    return dataclasses.replace(CONFIG, **fields)


# The distance of maps.


def maps(seed, spike=0.0):
    """[2,H,W,3] of mid and two blocks; a spike in the deepest."""
    found = [draw(seed + i, 2, side, side, 3) for i, side in enumerate((8, 16, 32))]
    found[2][0, 20:23, 25:28, 1] += spike
    return found


def value_and_grad(config, predicted, target, taps=(0, 2)):
    """((summed loss, distance), gradient by the predicted maps); without a mask and with one."""

    def total(predicted):
        found = distance(config, predicted, target, taps)
        return jnp.sum(found.loss), found

    return jax.value_and_grad(total, has_aux=True)([jnp.asarray(x) for x in predicted])


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_maps_of_the_data_itself_cost_nothing_and_pull_nowhere(normaliser, penalty):
    config = with_(normaliser=normaliser, penalty=penalty)
    target = maps(0, spike=20.0)
    (value, found), grads = value_and_grad(config, target, target)
    assert found.kept[0] < found.kept[1] and value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)
    (value, _), grads = value_and_grad(config, maps(4), target)
    assert value > 0 and all(np.abs(grads[tap]).max() > 0 for tap in (0, 2))


@pytest.mark.parametrize("level", [0.0, 3.0])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_constant_maps_have_finite_losses_and_gradients(normaliser, level):
    flat = [np.full_like(x, level) for x in maps(0)]
    config = with_(normaliser=normaliser)
    for predicted, target in ((flat, flat), (flat, maps(0)), (maps(0), flat)):
        (value, found), grads = value_and_grad(config, predicted, target)
        assert np.isfinite(value) and np.isfinite(found.kept).all()
        assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize(
    ("normaliser", "predicted_too", "shift", "same"),
    [
        ("pred_stats", True, 5.0, True),
        ("pred_stats_sg", True, 5.0, True),
        ("target_stats", True, 5.0, True),
        ("separate", True, 5.0, True),
        ("separate", False, 5.0, True),
        ("target_l2", True, 0.0, True),
        ("pred_stats", False, 5.0, False),
        ("target_stats", False, 5.0, False),
        ("target_l2", False, 0.0, False),
        ("target_l2", True, 5.0, False),
        ("none", True, 0.0, False),
    ],
)
def test_a_normaliser_undoes_what_it_should_and_no_more(normaliser, predicted_too, shift, same):
    config = with_(normaliser=normaliser, mask=False)

    def moved(found):
        return [3 * x + shift for x in found]

    predicted, target = maps(0), maps(4)
    before = distance(config, predicted, target, (0, 1)).loss
    after = distance(
        config, moved(predicted) if predicted_too else predicted, moved(target), (0, 1)
    )
    assert np.allclose(after.loss, before, rtol=1e-4) == same


def test_statistics_of_the_prediction_are_held_or_not_in_the_gradient_only():
    free, held = (
        value_and_grad(with_(normaliser=name), maps(0), maps(4), (1,))
        for name in ("pred_stats", "pred_stats_sg")
    )
    assert free[0][0] == held[0][0]
    assert np.abs(free[1][1] - held[1][1]).max() > 1e-3 * np.abs(held[1][1]).max()
    # Held, no gradient along a prediction that grows, and so none of its own statistics.
    x, y = maps(0)[1].astype(float), maps(4)[1].astype(float)
    std = x.std((1, 2), keepdims=True)
    expected = 2 * (x - y) / std**2 / (2 * 16**2 * 3)
    np.testing.assert_allclose(held[1][1], expected, atol=1e-4 * np.abs(expected).max())


def test_distance_is_the_formula_written_by_hand():
    predicted, target = maps(0), maps(4, spike=20.0)
    expected = 0.0
    for tap, (x, y) in enumerate(zip(predicted, target, strict=True)):
        x, kept = np.asarray(x, float), np.asarray(inliers(CONFIG, y, tap), float)
        mean, std = x.mean((1, 2), keepdims=True), x.std((1, 2), keepdims=True)
        error = kept * ((x - mean) / std - (y * kept - mean) / std) ** 2
        expected += 2.0**-tap * (error.sum((1, 2)) / kept.sum((1, 2))).mean(-1) / 3
    found = distance(CONFIG, predicted, target, (0, 1, 2))
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    assert found.kept[0] < 0.993 < found.kept[1]
    np.testing.assert_allclose(found.kept, kept.mean((1, 2, 3)), rtol=1e-6)  # of the one with one


@pytest.mark.parametrize(
    ("penalty", "error", "expected", "slope"),
    [
        ("l1", -3.0, 3.0, -1.0),
        ("l2", -3.0, 9.0, -6.0),
        ("huber", -3.0, 2.5, -1.0),
        ("huber", 0.5, 0.125, 0.5),
        ("huber", 0.0, 0.0, 0.0),
    ],
)
def test_penalties_are_their_closed_forms(penalty, error, expected, slope):
    target = [np.ones((2, 4, 4, 3), np.float32)]
    config = dataclasses.replace(PLAIN, penalty=penalty)
    (_, found), (grad,) = value_and_grad(config, [target[0] + error], target, (0,))
    np.testing.assert_allclose(found.loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, slope / 48, rtol=1e-6)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_mean_does_not_depend_on_resolution_and_a_sum_does(normaliser):
    config = with_(normaliser=normaliser, mask=False, depth_weights="uniform")

    def enlarged(found):
        return [x.repeat(2, axis=1).repeat(2, axis=2) for x in found]

    small = (maps(0)[:2], maps(4)[:2])
    large = tuple(enlarged(found) for found in small)
    for reduction, factor in (("mean", 1), ("sum", 4)):
        config = dataclasses.replace(config, reduction=reduction)
        before, after = (distance(config, *pair, (0, 1)).loss for pair in (small, large))
        np.testing.assert_allclose(after, factor * before, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1 + 4 + 16) / 3),
        ({"depth_weights": "inverse_resolution"}, (1 + 4 / 2 + 16 / 4) / 3),
        ({"depth_weights": "inverse_resolution", "taps": ("up1",)}, 16 / 4),
        ({"taps": ("up1", "mid"), "tap_weights": (10.0, 0.5)}, (160 + 0.5) / 2),
        ({"taps": ("up1", "mid"), "reduction": "sum"}, 16 * 32**2 + 1 * 8**2),
    ],
)
def test_taps_are_weighted_and_averaged(fields, expected):
    config = dataclasses.replace(PLAIN, **fields)
    # An error of 1, 2, 4 in the maps of sides 8, 16, 32.
    target = maps(0)
    predicted = [x + 2.0**i for i, x in enumerate(target)]
    found = distance(config, predicted, target, tap_indices(config, 3))
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)


def test_maps_of_bf16_are_compared_in_f32_and_the_target_is_not_moved():
    x, y = ([jnp.asarray(m, jnp.bfloat16) for m in maps(seed)] for seed in (0, 4))
    found = distance(CONFIG, x, y, (0, 1))
    assert found.loss.dtype == found.kept.dtype == jnp.float32
    exact = distance(CONFIG, *([m.astype(jnp.float32) for m in both] for both in (x, y)), (0, 1))
    np.testing.assert_array_equal(found.loss, exact.loss)
    grads = jax.grad(lambda y: jnp.sum(distance(CONFIG, x, y, (0, 1)).loss))(y)
    assert all(np.all(grad == 0) for grad in grads)


def test_taps_are_places_in_the_decoder():
    assert tap_indices(CONFIG, 3) == (0, 1, 2)
    assert tap_indices(with_(taps=("up1", "mid")), 3) == (2, 0)
    with pytest.raises(InputError, match=r"lpl.taps: 'up2' is no map .*\['mid', 'up0', 'up1'\]"):
        tap_indices(with_(taps=("up2",)), 3)
    with pytest.raises(InputError, match=r"lpl.tap_weights \(1.0,\) must be 3"):
        tap_indices(with_(tap_weights=(1.0,)), 3)


# The outlier mask.


def test_gaussian_maps_are_kept():
    # A value beyond 2.05 + 2 standard deviations is one in 20000. At full size it is a speck and
    # comes back; up to up1, where nothing does, it takes 3 x 3 pixels with it.
    values = draw(0, 4, 32, 32, 32)
    assert inliers(CONFIG, values, 3).all()
    assert 0.998 < inliers(CONFIG, values, 2).mean() < 1


@pytest.mark.parametrize(
    ("at", "size", "tap", "removed"),
    [
        (20, 6, 3, (19, 27)),  # 6 shrinks to 4, which grows to 8
        (20, 6, 2, (19, 27)),  # 6 grows to 8
        (0, 6, 3, (0, 7)),  # beyond the border is nothing: 5, then 7
        (20, 2, 3, None),  # dropped
        (20, 1, 2, (19, 22)),
        (20, 6, 1, None),
    ],
)
def test_a_spike_is_removed_with_a_margin(at, size, tap, removed):
    values = np.clip(draw(0, 1, 64, 64, 2), -3, 3)
    values[:, at : at + size, at : at + size, 1] += 20
    expected = np.ones(values.shape, bool)
    if removed:
        inside = slice(*removed)
        expected[:, inside, inside, 1] = False
    np.testing.assert_array_equal(inliers(CONFIG, values, tap), expected)
    np.testing.assert_array_equal(inliers(CONFIG, -values, tap), expected)
    assert inliers(with_(mask=False), values, tap).all()


def test_quantiles_are_the_kth_values_and_the_margin_is_an_unbiased_deviation():
    values = np.random.default_rng(0).permutation(1024).astype(np.float32).reshape(1, 32, 32, 1)
    bare = with_(mask_open=1, mask_close=1, mask_stds=0.0)
    # int(0.02 * 1024) = 20 and int(0.98 * 1024) = 1003: the 20th value is 19.
    np.testing.assert_array_equal(inliers(bare, values, 3), (values > 19) & (values < 1002))
    # 3.4 is within one unbiased deviation (1.45) of 2, and not of a biased one (1.26).
    few = jnp.array([0.0, 1.0, 2.0, 3.4]).reshape(1, 2, 2, 1)
    assert inliers(with_(mask_open=1, mask_close=1, mask_stds=1.0), few, 3).all()


# The gate, and the rows that are decoded.


@pytest.mark.parametrize(
    ("process", "levels", "wide", "narrow"),
    [
        (ProcessConfig(), NoiseLevels(), 0.518, 0.137),  # t up to 517 and 136 of 1000
        (
            ProcessConfig("ddpm_linear", beta_start=1e-4, beta_end=0.02),
            NoiseLevels(),
            0.475,
            0.165,
        ),
        (ProcessConfig("flow"), NoiseLevels(), 0.75, 0.366),
        (ProcessConfig("flow"), NoiseLevels("logit_normal"), 0.864, 0.291),
        (ProcessConfig("edm", sigma_data=0.5), NoiseLevels("log_normal", -0.4), 0.790, 0.200),
    ],
)
def test_gated_share_is_the_probability_of_a_draw(process, levels, wide, narrow):
    process = make_process(process)
    assert gated_share(process, levels, 3.0) == pytest.approx(wide, abs=1e-3)
    assert gated_share(process, levels, 0.577) == pytest.approx(narrow, abs=1e-3)


def test_gated_share_is_that_of_the_draws_of_training():
    process, levels = make_process(ProcessConfig("flow_cosine")), NoiseLevels("mode", shift=2.0)
    times = draw_times(process, levels, example_keys(key_for(0, "t"), jnp.arange(4000)))
    drawn = float(np.mean(noise_ratio(process, times) <= 2.0))
    assert gated_share(process, levels, 2.0) == pytest.approx(drawn, abs=0.02)


@pytest.mark.parametrize("kind", ["flow", "flow_cosine"])
def test_noise_alone_has_an_infinite_ratio_and_no_gradient(kind):
    process = make_process(ProcessConfig(kind))
    times = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(noise_ratio(process, times), [0.0, 1.0, np.inf], atol=1e-6)
    slopes = jax.grad(lambda t: jnp.sum(jnp.where(t < 1, noise_ratio(process, t), 0.0)))(times)
    assert np.isfinite(slopes).all() and slopes[2] == 0
    with_zero = make_process(ProcessConfig(zero_terminal_snr=True))
    assert noise_ratio(with_zero, jnp.array([999]))[0] == np.inf


def test_ratio_of_edm_is_in_units_of_the_data():
    process = make_process(ProcessConfig("edm", sigma_data=0.5))
    np.testing.assert_allclose(noise_ratio(process, jnp.array([0.25, 1.5])), [0.5, 3.0])


def test_capacity_holds_the_gated_rows_of_most_batches():
    process, levels = make_process(ProcessConfig("flow")), NoiseLevels()
    # p = 0.75: 192 + 6.93 of 256, 3 + 0.87 of 4, 0.75 + 0.43 of 1.
    assert [capacity(CONFIG, process, levels, b) for b in (256, 4, 1)] == [199, 4, 1]
    assert capacity(with_(nsr_max=1e-9), process, levels, 256) == 1
    assert [capacity(with_(share=s), process, levels, 30) for s in (1.0, 0.1, 0.01)] == [30, 3, 1]
    inside = jax.jit(lambda z: z[: capacity(CONFIG, process, levels, len(z))])
    assert inside(jnp.zeros(256)).shape == (199,)


@pytest.mark.parametrize("gated", [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
def test_every_gated_row_is_chosen_as_often_and_no_other(gated):
    gated = jnp.array(gated, bool)
    choose = jax.jit(functools.partial(choose_rows, count=2))
    total = np.zeros(4)
    for order in itertools.permutations([0.0, 0.25, 0.5, 0.9]):
        index, weight = choose(gated, jnp.array(order))
        assert index.dtype == jnp.int32 and len(set(np.asarray(index))) == 2
        np.add.at(total, np.asarray(index), np.asarray(weight))
        assert sum(weight > 0) == min(2, sum(gated))
        assert sum(weight) == pytest.approx(float(sum(gated)))
    np.testing.assert_allclose(total / 24, np.asarray(gated, float), rtol=1e-6)


# The loss of a batch.

KERNELS = [0.4 * draw(10 + i, 3, 3, c_in, 4) for i, c_in in enumerate((2, 4, 4))]
PREDICTED, TARGET = draw(0, 4, 4, 4, 2), draw(1, 4, 4, 4, 2)
ORDER = jnp.array([0.3, 0.9, 0.1, 0.6])
RATIO = jnp.array([0.5, 2.9, jnp.inf, 1.0])


def decoder(z):
    """A decoder's maps of random convolutions, at sides 4, 8 and 16."""
    found = []
    for kernel in KERNELS:
        if found:
            z = jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)
        z = jnp.tanh(
            jax.lax.conv_general_dilated(
                z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
        found.append(z)
    return found


@functools.cache
def compiled(count, multiple=1, config=CONFIG, features=decoder):
    def value(predicted, target, ratio, order):
        found = perceptual_loss(
            config, features, predicted, target, ratio, order, count, multiple=multiple
        )
        return found.value, found

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


def run(predicted=PREDICTED, target=TARGET, ratio=RATIO, order=ORDER, **options):
    (_, found), grads = compiled(**({"count": 4} | options))(predicted, target, ratio, order)
    return found, grads


def whole_batch():
    found = distance(CONFIG, decoder(PREDICTED), decoder(TARGET), (0, 1, 2))
    return np.asarray(found.loss), np.asarray(found.kept)


def test_all_rows_decoded_give_the_mean_of_the_whole_batch_behind_the_gate():
    found, _ = run()
    losses, kept = whole_batch()
    passing = np.array([1, 1, 0, 1])
    assert found.value == pytest.approx((losses * passing).mean(), rel=1e-6)
    assert found.gated == 0.75
    assert found.kept == pytest.approx((kept * passing).sum() / 3, rel=1e-6)


def test_few_rows_decoded_give_the_same_in_the_mean():
    permutations = itertools.permutations([0.0, 0.25, 0.5, 0.9])
    values, grads = [], []
    for order in permutations:
        found, grad = run(order=jnp.array(order), count=2)
        values.append(float(found.value))
        grads.append(np.asarray(grad[0]))
    everything, grad = run()
    assert np.mean(values) == pytest.approx(float(everything.value), rel=1e-6)
    assert np.std(values) > 0.01 * np.mean(values)
    np.testing.assert_allclose(np.mean(grads, 0), grad[0], atol=1e-6 * np.abs(grad[0]).max())


def test_rows_that_fill_up_change_nothing():
    found, grads = run(count=2)
    filled, filled_grads = run(count=2, multiple=4)
    for ours, theirs in zip(found, filled, strict=True):
        assert ours == pytest.approx(float(theirs), rel=1e-6)
    np.testing.assert_allclose(filled_grads[0], grads[0], atol=1e-6 * np.abs(grads[0]).max())


def test_latents_are_laid_out_once_they_are_filled_up():
    shapes = []

    def place(z):
        shapes.append(z.shape)
        return z

    jax.eval_shape(
        lambda *arrays: perceptual_loss(CONFIG, decoder, *arrays, 3, multiple=8, place=place),
        PREDICTED, TARGET, RATIO, ORDER,
    )  # fmt: skip
    assert shapes == [(8, 4, 4, 2)] * 2


def test_the_data_itself_costs_nothing_and_only_the_prediction_is_moved():
    found, grads = run(predicted=TARGET)
    assert found.value == 0
    np.testing.assert_array_equal(grads[0], 0)
    _, grads = run()
    moved = np.abs(grads[0]).max((1, 2, 3)) > 0
    np.testing.assert_array_equal(moved, [True, True, False, True])
    np.testing.assert_array_equal(grads[1], 0)


@pytest.mark.parametrize("wild", [1e30, np.inf, np.nan])
def test_rows_behind_the_gate_may_be_anything(wild):
    predicted = PREDICTED.copy()
    predicted[2] = wild
    found, grads = run(predicted=predicted)
    calm, calm_grads = run()
    assert found.value == calm.value
    np.testing.assert_array_equal(grads[0], calm_grads[0])
    found, grads = run(predicted=np.full_like(PREDICTED, wild), ratio=jnp.full(4, 3.01))
    assert (found.value, found.gated, found.kept) == (0, 0, 1)
    np.testing.assert_array_equal(grads[0], 0)


def unscaled(z):
    return decoder((z - 0.25) / 3)


def test_scale_and_shift_of_the_latents_cancel():
    found, grads = run()
    moved, moved_grads = run(
        predicted=3 * PREDICTED + 0.25, target=3 * TARGET + 0.25, features=unscaled
    )
    assert moved.value == pytest.approx(float(found.value), rel=1e-5)
    np.testing.assert_allclose(3 * moved_grads[0], grads[0], atol=1e-5 * np.abs(grads[0]).max())


# The config.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": -1.0}, r"lpl.weight -1.0 must be at least 0"),
        ({"target_ratio": float("nan")}, r"lpl.target_ratio nan must be"),
        ({"weight": 1.0, "target_ratio": 0.25}, r"lpl.weight 1.0 and lpl.target_ratio 0.25"),
        ({"calibration_steps": 0}, r"lpl.calibration_steps 0 must be at least 1"),
        ({"start_step": -1}, r"lpl.start_step -1 must be at least 0"),
        ({"every": 0}, r"lpl.every 0 must be at least 1"),
        ({"nsr_max": 0.0}, r"lpl.nsr_max 0.0 must be above 0"),
        ({"share": 1.1}, r"lpl.share 1.1 must be in \[0, 1\]"),
        ({"taps": ("mid", "down0")}, r"lpl.taps .*'down0'.* must be different names"),
        ({"taps": ("up01",)}, r"lpl.taps \('up01',\) must be"),
        ({"taps": ("mid", "mid")}, r"lpl.taps .* must be different"),
        ({"depth_weights": "deep"}, r"lpl.depth_weights 'deep' is unknown.*'uniform'"),
        ({"tap_weights": (-1.0,)}, r"lpl.tap_weights -1.0 must be at least 0"),
        ({"taps": ("mid",), "tap_weights": (1.0, 2.0)}, r"lpl.tap_weights .* as many as lpl.taps"),
        ({"tap_weights": (0.0, 0.0)}, r"lpl.tap_weights \(0.0, 0.0\) must be above 0 for some"),
        ({"normaliser": "shared"}, r"lpl.normaliser 'shared' is unknown.*'pred_stats'"),
        ({"mask_quantile": 0.5}, r"lpl.mask_quantile 0.5 must be in \[0, 0.5\)"),
        ({"mask_stds": -2.0}, r"lpl.mask_stds -2.0 must be at least 0"),
        ({"mask_open": 4}, r"lpl.mask_open 4 must be an odd number"),
        ({"mask_close": -1}, r"lpl.mask_close -1 must be an odd number"),
        ({"mask_from": -1}, r"lpl.mask_from -1 must be at least 0"),
        ({"penalty": "mse"}, r"lpl.penalty 'mse' is unknown.*'l2'"),
        ({"reduction": "none"}, r"lpl.reduction 'none' is unknown"),
        ({"compute_dtype": "float16"}, r"lpl.compute_dtype 'float16' is unknown"),
    ],
)
def test_configs_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        PerceptualConfig(**fields)


def test_a_weight_or_a_ratio_makes_it_active():
    assert [with_(**fields).active for fields in ({}, {"weight": 3.0}, {"target_ratio": 0.2})] == [
        False,
        True,
        True,
    ]
