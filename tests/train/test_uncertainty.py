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
from ldm_jax.train import denoiser, ema, optim, uncertainty
from ldm_jax.train.step import Seen, Training, make_trainer
from tests import tiny

FLOW = make_process(ProcessConfig("flow"))
TIMES = np.linspace(0, 1, 64, dtype=np.float32)
Z0, NOISE = (jax.random.normal(key_for(0, name), (64, 2, 2, 2)) for name in ("z0", "noise"))
OPTIM = optim.OptimConfig(lr=0.01, schedule="cosine")


def losses(params, t):
    """Of a denoiser that says w z_t."""

    def network(z_t, t, cond):
        return params["w"] * z_t

    def log_loss(t):
        return uncertainty.apply(params["uncertainty"], FLOW.unit_time(t))

    u = log_loss if "uncertainty" in params else None
    z0, noise = (jnp.broadcast_to(x[:1], x.shape) for x in (Z0, NOISE))
    aim = Objective("velocity")
    return denoising_loss(
        network, FLOW, aim, z0=z0, noise=noise, t=t, cond=None, uncertainty=u
    ).loss


def mean_loss(trained, extra, frozen, batch, step):
    return losses(trained, batch["t"]).mean(), Seen({}, {})


def trainer_of(mesh, width=64):
    training = Training(
        init=lambda key: {"w": jnp.ones(())},
        axes={"w": ()},
        loss=mean_loss,
        optimizer=optim.make_optimizer(OPTIM, 800),
        learning_rate=optim.learning_rate(OPTIM, 800),
        average=ema.EmaConfig(0.9),
        batch={"t": jax.ShapeDtypeStruct((64,), jnp.float32)},
        init_extra=lambda params: {"uncertainty": uncertainty.init(width)},
        extra_axes={"uncertainty": uncertainty.axes()},
        trained_extra=("uncertainty",),
    )
    return make_trainer(training, mesh)


def test_uncertainty_learns_the_logarithm_of_the_loss_at_each_time():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainer = trainer_of(mesh)
    state = trainer.init()
    first = float(losses(state.params, TIMES).mean())
    for n in range(800):
        state, metrics = trainer.step(state, {}, put_batch({"t": TIMES}, mesh, 64))
        assert n or metrics["loss"] == pytest.approx(first, rel=1e-5)  # u starts at 0
    u = uncertainty.apply(state.extra["uncertainty"], jnp.asarray(TIMES))
    want = np.log(losses(state.params, TIMES))
    assert want.max() - want.min() > 1
    np.testing.assert_allclose(u, want, atol=0.08)
    # The denoiser, too, was trained, and the average is of it alone.
    assert state.params.keys() == state.weights.keys() == {"w"} and state.params["w"] != 1


def test_uncertainty_trains_alike_on_a_mesh():
    ends = []
    for config, count in ((MeshConfig(), 1), (MeshConfig(2, 2, 2), 8)):
        mesh = make_mesh(config, jax.devices()[:count])
        trainer = trainer_of(mesh, 8)
        state = trainer.init()
        for _ in range(3):
            state, metrics = trainer.step(state, {}, put_batch({"t": TIMES}, mesh, 64))
        ends.append(jax.device_get((state.params, state.extra, metrics["loss"])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *ends)
    assert np.any(ends[0][1]["uncertainty"]["weight"])


def test_loss_is_by_the_uncertainty_in_training_and_plain_without_it(monkeypatch):
    monkeypatch.setattr(denoiser.denoiser, "apply", lambda config, p, z_t, t, cond: p["w"] * z_t)
    of = denoiser.Denoising(
        model=tiny.DENOISER.model,
        process=make_process(tiny.DENOISER.process),
        objective=Objective(uncertainty=4),
        codec=latents.make_codec("sample", "point", latents.Whitening((0.0, 0.0), (1.0, 1.0))),
        loss=denoiser.DenoiserLoss(),
        seed=0,
    )
    batch = {"moments": Z0[:4], "label": jnp.arange(4)}
    params = {"w": jnp.float32(0.5)}
    weight = jnp.array([0.3, -0.2, 0.5, 0.1])

    @jax.jit
    def judge(params):
        examples = denoiser.per_example(of)(params, {}, batch, 0)
        return examples.loss, examples.times

    plain, times = judge(params)
    value, _ = judge({**params, "uncertainty": {"weight": weight}})
    u = uncertainty.apply({"weight": weight}, times)
    np.testing.assert_allclose(value, plain / np.exp(u) + u, rtol=1e-5)


def test_uncertainty_varies_with_time_and_is_linear_in_its_weights():
    weight = jnp.arange(8.0)
    u = uncertainty.apply({"weight": weight}, jnp.asarray(TIMES))
    assert u.dtype == jnp.float32 and np.std(u) > 0.1
    double = uncertainty.apply({"weight": 2 * weight}, jnp.asarray(TIMES))
    np.testing.assert_allclose(double, 2 * u, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="uncertainty -1 must be at least 0"):
        Objective(uncertainty=-1)
