"""Samples of latents in two halves: the mean half decoded, or resampled by the other one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import autoencoder, denoiser, latents
from ldm_jax.models.layers import upsample_nearest
from ldm_jax.runs.denoiser import Guide
from ldm_jax.sampling.draw import check_options, draw_samples
from ldm_jax.sampling.inputs import read_images
from ldm_jax.sampling.judged import sampling
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sampling.program import compile_sampler, numbers_of, weights_of
from tests.sampling.quick import BAD, TABLE, encode, model_of, quick  # noqa: F401

FEW = SampleOptions(num=4, steps=4, batch_size=4, spacing="trailing", seed=5)
WHITE = latents.Whitening((0.1, 0.0, -0.1), (0.5, 0.4, 0.6))
SECOND = latents.Whitening((-3.0,) * 3, (0.5,) * 3, (-4.0,) * 3, (-2.0,) * 3)


def network(config, params, z_t, t, cond):
    shift = jnp.tile(TABLE[cond["label"]], 2)[:, None, None]
    return params["gain"] * jnp.tanh(z_t) + shift


def gaussian(config, params, x):
    mean = encode(config, params, x)
    return jnp.concatenate([mean, -3 + mean], -1)


@pytest.fixture(scope="module")
def model():
    plain = model_of()
    codec = latents.make_codec("mean_logvar", "gaussian", WHITE.beside(SECOND))
    run = dataclasses.replace(plain.run, codec="mean_logvar")
    return dataclasses.replace(plain, run=run, codec=codec)


@pytest.fixture(autouse=True)
def halves(quick, monkeypatch):  # noqa: F811
    """Sampling with two halves; images are the first stage's latents [num,h,w,C] themselves."""
    monkeypatch.setattr(denoiser, "apply", network)
    monkeypatch.setattr(autoencoder, "encode", gaussian)
    monkeypatch.setattr(autoencoder, "to_uint8", lambda x: x)
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: z)


def test_both_rules_decode_the_same_latents_and_differ_by_the_spread_they_tell(model):
    mean = draw_samples(model, FEW).images
    drawn = draw_samples(model, dataclasses.replace(FEW, decode="resampled")).images
    z = drawn_latents(model)
    np.testing.assert_allclose(mean, WHITE.unwhiten(z[..., :3]), atol=1e-5)
    logvar = np.clip(SECOND.unwhiten(z[..., 3:]), -4, -2)
    noise = normal_like(example_keys(key_for(5, "posterior"), jnp.arange(4)), mean)
    np.testing.assert_allclose(drawn - mean, np.exp(logvar / 2) * noise, rtol=1e-3, atol=1e-5)


def drawn_latents(model):
    @dataclasses.dataclass(frozen=True)
    class Whole(latents.ConcatCodec):
        def decode(self, z, keys=None):
            return z

    codec = Whole(model.codec.spread, model.codec.whitening)
    return draw_samples(dataclasses.replace(model, codec=codec), FEW).images


def test_resampled_samples_depend_on_their_index_alone_and_so_does_their_progress(model):
    options = dataclasses.replace(FEW, decode="resampled", num=6, progressive=2)
    drawn = draw_samples(model, options)
    np.testing.assert_allclose(drawn.progress[:, -1], drawn.images, atol=1e-6)
    parts = draw_samples(model, dataclasses.replace(options, batch_size=2))
    np.testing.assert_allclose(parts.images, drawn.images, atol=1e-5)
    other = draw_samples(model, dataclasses.replace(FEW, decode="resampled", seed=6))
    assert np.abs(other.images - drawn.images[:4]).max() > 0.1


def test_images_to_start_from_are_encoded_into_both_halves(model, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "init.npz", images)
    np.savez(tmp_path / "mask.npz", np.arange(256).reshape(1, 16, 16) >= 128)  # the lower half
    z0 = np.asarray(model.codec.encode_mode(gaussian(None, None, autoencoder.to_unit(images))))
    painting = dataclasses.replace(
        FEW,
        init_images=str(tmp_path / "init.npz"),
        strength=0.5,
        masks=str(tmp_path / "mask.npz"),
        progressive=1,
    )

    def begun_and_known(predict, grid, z, cond, keys, known, every):
        return z, jnp.stack([z, known.mask * known.z0])

    monkeypatch.setitem(samplers.SAMPLERS, "ddim", begun_and_known)
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: upsample_nearest(z))
    process = make_process(model.run.process)
    rows = {"index": jnp.arange(4), "label": jnp.arange(4), **read_images(painting, model)}
    program = compile_sampler(model, painting)
    begun, known = program(weights_of(model), numbers_of(painting, process), rows)[1].swapaxes(0, 1)
    grid = make_grid(process, 4, "trailing")
    keys = example_keys(key_for(5, "initial_noise"), jnp.arange(4))
    noise = np.asarray(normal_like(keys, jnp.zeros((4, 8, 8, 6))))
    np.testing.assert_allclose(begun, grid.alpha[2] * z0 + grid.sigma[2] * noise, atol=1e-4)
    np.testing.assert_allclose(known[:, :4], z0[:, :4], atol=1e-5)
    np.testing.assert_array_equal(known[:, 4:], 0)


def test_tiles_guidance_of_some_channels_and_a_guide_take_both_halves(model):
    plain = dataclasses.replace(FEW, size=(16, 24))
    tiled = draw_samples(model, dataclasses.replace(plain, tile=16, tile_overlap=8)).images
    np.testing.assert_allclose(tiled, draw_samples(model, plain).images, atol=1e-5)
    led = dataclasses.replace(model, guide=Guide(None, model.run, BAD, 3, "params"))
    auto = dataclasses.replace(FEW, guidance=2.0, guide_step=3)
    want, both = draw_samples(model, FEW).images, draw_samples(led, auto).images
    assert np.abs(both - want).max() > 0.05
    # The halves do not mix in this network: guided in the second alone, the means stay.
    second = dataclasses.replace(auto, guided_channels=(3, 4, 5))
    np.testing.assert_allclose(draw_samples(led, second).images, want, atol=1e-5)
    with pytest.raises(InputError, match=r"guided-channels 6 must be different ones .* 0\.\.5"):
        check_options(dataclasses.replace(auto, guided_channels=(6,)), led)


def test_the_rule_is_part_of_the_protocol_where_it_is_another(model):
    resampled = sampling(dataclasses.replace(FEW, decode="resampled"), model)
    assert resampled.pop("decode") == "resampled"
    assert resampled == sampling(FEW, model)


def test_decodings_that_cannot_be_are_refused(model):
    with pytest.raises(InputError, match=r"decode 'mode' is unknown; choose one of \['mean', 're"):
        check_options(dataclasses.replace(FEW, decode="mode"), model)
    with pytest.raises(InputError, match=r"codec 'sample' has none; leave --decode out, or train"):
        check_options(dataclasses.replace(FEW, decode="resampled"), model_of())
