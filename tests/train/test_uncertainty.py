"""Laws of the learned uncertainty, and of what is trained beside a model that it is no part of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.objective import Objective, denoising_loss
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.errors import InputError
from ldm_jax.keys import key_for
from ldm_jax.models import latents
from ldm_jax.sharding import MeshConfig, make_mesh, put_batch
from ldm_jax.train import ema, optim, steps, uncertainty
from ldm_jax.train.state import init_state
from tests import tiny

FLOW = make_process(ProcessConfig("flow"))
TIMES = np.linspace(0, 1, 64, dtype=np.float32)
Z0, NOISE = (jax.random.normal(key_for(0, name), (64, 2, 2, 2)) for name in ("z0", "noise"))
OPTIM = optim.OptimConfig(lr=0.01, schedule="cosine")


def losses(params, t):
    """Of a denoiser that says w z_t."""
    u = None
    if "uncertainty" in params:
        u = lambda t: uncertainty.apply(params["uncertainty"], FLOW.unit_time(t))  # noqa: E731
    says = lambda z_t, t, cond: params["w"] * z_t  # noqa: E731
    aim = Objective("velocity")
    same = jnp.broadcast_to(Z0[:1], Z0.shape), jnp.broadcast_to(NOISE[:1], NOISE.shape)
    return denoising_loss(
        says, FLOW, aim, z0=same[0], noise=same[1], t=t, cond=None, uncertainty=u
    ).loss


def built(mesh, width=64):
    optimizer = optim.make_optimizer(OPTIM, 800)
    state, shardings = init_state(
        lambda: {"w": jnp.ones(())},
        {"w": ()},
        optimizer,
        mesh,
        with_ema=True,
        init_extra=lambda _: {"uncertainty": uncertainty.init(width)},
        extra_axes={"uncertainty": uncertainty.axes()},
        train_extra=True,
    )
    loss = lambda params, batch, step: (losses(params, batch["t"]).mean(), {})  # noqa: E731
    rate = optim.learning_rate(OPTIM, 800)
    step = steps.make_step(loss, optimizer, rate, ema.EmaConfig(0.9), mesh, shardings)
    return state, step


def test_uncertainty_learns_the_logarithm_of_the_loss_at_each_time():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state, step = built(mesh)
    assert step(jax.tree.map(jnp.copy, state), put_batch({"t": TIMES}, mesh, 64))[1][
        "loss"
    ] == pytest.approx(float(losses(state.params, TIMES).mean()), rel=1e-5)  # u starts at 0
    for _ in range(800):
        state, _ = step(state, put_batch({"t": TIMES}, mesh, 64))
    u = uncertainty.apply(state.extra["uncertainty"], jnp.asarray(TIMES))
    want = np.log(losses(state.params, TIMES))
    assert want.max() - want.min() > 1
    np.testing.assert_allclose(u, want, atol=0.08)
    # The denoiser, too, was trained, and the average is of it alone.
    assert state.params.keys() == state.ema.keys() == {"w"} and state.params["w"] != 1


def test_uncertainty_trains_alike_on_a_mesh():
    ends = []
    for config, count in ((MeshConfig(), 1), (MeshConfig(2, 2, 2), 8)):
        mesh = make_mesh(config, jax.devices()[:count])
        state, step = built(mesh, 8)
        for _ in range(3):
            state, metrics = step(state, put_batch({"t": TIMES}, mesh, 64))
        ends.append(jax.device_get((state.params, state.extra, metrics["loss"])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *ends)
    assert np.any(ends[0][1]["uncertainty"]["weight"])


def test_loss_is_by_the_uncertainty_in_training_and_plain_without_it(monkeypatch):
    says = lambda config, params, z_t, t, cond: params["w"] * z_t  # noqa: E731
    monkeypatch.setattr(steps.denoiser, "apply", says)
    process, run = make_process(tiny.DENOISER.process), tiny.DENOISER.model
    aim = Objective(uncertainty=4)
    whitening = latents.Whitening((0.0, 0.0), (1.0, 1.0))
    judge = steps.denoiser_losses(run, steps.DenoiserLoss(), process, whitening, 0, aim)
    batch = {"moments": Z0[:4], "label": jnp.arange(4)}
    params = {"w": jnp.float32(0.5)}
    weight = jnp.array([0.3, -0.2, 0.5, 0.1])
    judge = jax.jit(judge, static_argnums=2)
    plain, times = judge(params, batch, 0)
    value, _ = judge({**params, "uncertainty": {"weight": weight}}, batch, 0)
    u = uncertainty.apply({"weight": weight}, times)
    np.testing.assert_allclose(value, plain / np.exp(u) + u, rtol=1e-5)


def test_uncertainty_varies_with_time_and_is_linear_in_its_weights():
    weight = jnp.arange(8.0)
    u = uncertainty.apply({"weight": weight}, jnp.asarray(TIMES))
    assert u.dtype == jnp.float32 and np.std(u) > 0.1
    double = uncertainty.apply({"weight": 2 * weight}, jnp.asarray(TIMES))
    np.testing.assert_allclose(double, 2 * u, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="uncertainty -1 must not be negative"):
        Objective(uncertainty=-1)
