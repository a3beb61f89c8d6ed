"""The latent perceptual loss beside a denoiser's: its gradient, its weight, its rows.

A denoiser of one number and a decoder of one level; whole runs are in test_resume and test_mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.diffusion import parameterisation
from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.perceptual import PerceptualConfig, noise_ratio, perceptual_loss
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.errors import InputError
from ldm_jax.models import autoencoder
from ldm_jax.models.autoencoder import AutoencoderConfig
from ldm_jax.models.latents import PlainCodec, Whitening
from ldm_jax.models.quantizer import QuantizerConfig
from ldm_jax.runs.build import build, facts_of_config
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train import perceptual
from ldm_jax.train.denoiser import DenoiserLoss, Denoising, Examples
from ldm_jax.train.perceptual import FROZEN, STATE, Perceptual
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import draw_keys, value_and_grad
from tests import tiny

PROCESS = make_process(ProcessConfig(kind="flow"))
DECODERS = {
    latent: AutoencoderConfig(
        latent,
        resolution=8,
        width=4,
        width_multipliers=(1,),
        num_res_blocks=1,
        middle_attention=False,
        z_channels=2,
        latent_channels=2,
        norm_groups=2,
        quantizer=QuantizerConfig(codebook_size=8),
    )
    for latent in ("kl", "vq")
}
WHITE = Whitening((0.5, -1.0), (2.0, 0.5))


def setting(config, latent="kl", size=8):
    """(what the loss depends on, the frozen network)."""
    model = DECODERS[latent]
    posterior = "gaussian" if latent == "kl" else "point"
    denoising = Denoising(
        tiny.DENOISER.model,
        PROCESS,
        Objective("velocity"),
        PlainCodec(posterior, WHITE),
        DenoiserLoss(),
        0,
    )
    params = autoencoder.init(model, jax.random.key(5))
    return Perceptual(config, model, denoising, size), {FROZEN: perceptual.decoder_of(params)}


def toy_losses(params, frozen, batch, step):
    """A denoiser that says `w` times the velocity."""
    z0, noise, t = batch["z0"], batch["noise"], batch["t"]
    z_t = (1 - t)[:, None, None, None] * z0 + t[:, None, None, None] * noise
    output = params["w"] * (noise - z0)

    def loss_of(output):
        return jnp.square(output - (noise - z0)).mean((1, 2, 3))

    x0, _ = parameterisation.x0_and_eps(PROCESS, "velocity", z_t, output, t)
    return Examples(loss_of(output), t, z0, x0, t, output, loss_of)


def batch(seed, size=8):
    rng = np.random.default_rng(seed)
    z0, noise = rng.normal(size=(2, size, 8, 8, 2)).astype(np.float32)
    return {"z0": z0, "noise": noise, "t": rng.uniform(0, 1, size).astype(np.float32)}


def steps(of, frozen, batches, w=0.7):
    """(metrics of each step as numbers, the state after them); the parameter stays."""
    compute = perceptual.training_loss(toy_losses, of)
    after = perceptual.after_update(of.config)

    @jax.jit
    def step(state, batch):
        value, seen = compute(state.params, state.extra, frozen, batch, state.step)
        params, extra = after(state, state.params, state.extra, seen)
        return {"loss": value, **seen.metrics}, dataclasses.replace(
            state, params=params, extra=extra, step=state.step + 1
        )

    extra = {STATE: perceptual.init_state(of.config)}
    state, lines = TrainState(jnp.int32(0), {"w": jnp.float32(w)}, {}, {}, extra), []
    for rows in batches:
        line, state = step(state, rows)
        lines.append({k: float(v) for k, v in line.items()})
    return lines, state.extra[STATE]


def test_it_weighs_from_its_start_on_and_every_other_step_twice():
    config = PerceptualConfig(weight=2.0, start_step=1, every=2)
    lines, state = steps(*setting(config), [batch(n) for n in range(5)])
    for n, line in enumerate(lines):
        on = n in (2, 4)
        assert line["loss_lpl/count"] == on
        more = 2 * 2.0 * line["loss_lpl/sum"]
        assert (more > 0.01) == on
        np.testing.assert_allclose(line["loss"], line["loss_diffusion"] + more, rtol=1e-6)
    assert state["since"] == 2 and state["weight"] == 2


@pytest.mark.parametrize("latent", list(DECODERS))
def test_gradient_is_that_of_the_sum_taken_as_a_whole(latent):
    """And the ratio logged is that of the two gradients by the prediction."""
    of, frozen = setting(PerceptualConfig(weight=3.0, every=1, remat=False), latent)
    rows, extra = batch(1), {STATE: perceptual.init_state(of.config)}
    order = jax.vmap(jax.random.uniform)(draw_keys(0, "lpl_rows", 0, jnp.arange(8)))

    def lpl(x0):
        return (
            3.0
            * perceptual_loss(
                of.config,
                lambda z: autoencoder.decoder_maps(of.first_stage, frozen[FROZEN], z, 2),
                WHITE.unwhiten(x0),
                WHITE.unwhiten(rows["z0"]),
                noise_ratio(PROCESS, rows["t"]),
                order,
                of.count,
            ).value
        )

    def whole(params):
        examples = toy_losses(params, frozen, rows, 0)
        return examples.loss.mean() + lpl(examples.x0), examples

    def split(params):
        value, seen = perceptual.training_loss(toy_losses, of)(
            params, extra, frozen, rows, jnp.int32(0)
        )
        return value, seen.metrics

    at = {"w": jnp.float32(0.7)}
    (value, metrics), slope = jax.jit(jax.value_and_grad(split, has_aux=True))(at)
    (want, examples), slope_of_whole = jax.value_and_grad(whole, has_aux=True)(at)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(slope["w"], slope_of_whole["w"], rtol=1e-4)
    by_x0 = jax.grad(lpl)(examples.x0) * -rows["t"][:, None, None, None]
    by_output = jax.grad(lambda o: examples.loss_of(o).mean())(examples.output)
    np.testing.assert_allclose(
        metrics["lpl_gradient_ratio/sum"],
        jnp.linalg.norm(by_x0) / jnp.linalg.norm(by_output),
        rtol=1e-4,
    )


def test_calibration_reaches_the_ratio_and_holds_it():
    config = PerceptualConfig(
        target_ratio=0.25, calibration_steps=60, start_step=2, taps=("mid",), remat=False
    )
    lines, state = steps(*setting(config, size=32), [batch(n, 32) for n in range(182)])
    assert [line["lpl_weight"] > 0 for line in lines] == [n >= 62 for n in range(182)]
    assert state["since"] == 62

    def ratio(lines):
        lpl = sum(line["loss_lpl/sum"] for line in lines)
        return float(state["weight"]) * lpl / sum(line["loss_diffusion"] for line in lines)

    np.testing.assert_allclose(ratio(lines[2:62]), 0.25, rtol=1e-5)
    np.testing.assert_allclose(ratio(lines[62:]), 0.25, rtol=0.05)


def test_calibration_goes_on_until_an_example_passes_the_gate():
    config = PerceptualConfig(
        target_ratio=0.25, calibration_steps=2, taps=("mid",), remat=False, share=1.0
    )
    noisy = [batch(n) | {"t": np.full(8, 0.99, np.float32)} for n in range(3)]
    lines, state = steps(*setting(config), [*noisy, batch(9), batch(10)])
    assert [line["lpl_weight"] for line in lines[:4]] == [0, 0, 0, 0]
    assert lines[0]["loss_lpl/sum"] == 0 and lines[4]["lpl_weight"] > 0
    assert state["calibrated_on"] == 4 and np.isfinite(lines[4]["loss"])


def test_micro_batches_have_the_loss_and_the_gradient_of_the_whole():
    config = PerceptualConfig(weight=1.0, taps=("mid",), remat=False)
    whole, frozen = setting(config)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    replicated = {"w": NamedSharding(mesh, PartitionSpec())}
    found = []
    for count in (1, 2):
        of = dataclasses.replace(whole, count=8 // count)
        compute = perceptual.training_loss(toy_losses, of)
        extra = {STATE: perceptual.init_state(config)}

        def loss(params, batch, compute=compute, extra=extra):
            return compute(params, extra, frozen, batch, jnp.int32(0))

        at = {"w": jnp.float32(0.7)}
        out = jax.jit(
            lambda at, rows, loss=loss, count=count: value_and_grad(
                loss, at, rows, count=count, shardings=replicated
            )
        )(at, batch(3))
        found.append(out)
    (first, seen), slope = found[0]
    (second, parts), slope_of_parts = found[1]
    np.testing.assert_allclose(second, first, rtol=1e-5)
    np.testing.assert_allclose(slope_of_parts["w"], slope["w"], rtol=1e-4)
    name = "loss_lpl"
    mean = parts.metrics[f"{name}/sum"] / parts.metrics[f"{name}/count"]
    np.testing.assert_allclose(mean, seen.metrics[f"{name}/sum"], rtol=1e-5)


def test_what_no_decoder_has_is_refused():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    run = dataclasses.replace(tiny.DENOISER, lpl=PerceptualConfig(weight=1.0))
    pixels = AutoencoderConfig("identity", 8, width_multipliers=(1,), latent_channels=3)
    backbone = dataclasses.replace(run.model.backbone, in_channels=3, out_channels=3)
    on_pixels = dataclasses.replace(run, model=dataclasses.replace(run.model, backbone=backbone))
    with pytest.raises(InputError, match="an identity has none"):
        build(on_pixels, facts_of_config(on_pixels, pixels), mesh)
    deep = dataclasses.replace(run, lpl=PerceptualConfig(weight=1.0, taps=("mid", "up7")))
    with pytest.raises(InputError, match="'up7' is no map of this decoder"):
        build(deep, facts_of_config(deep, tiny.AUTOENCODER.model), mesh)
