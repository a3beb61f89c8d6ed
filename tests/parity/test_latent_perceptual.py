"""The latent perceptual loss against one written in torch from the formula, mask and all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm_jax.diffusion import parameterisation, perceptual
from ldm_jax.diffusion.perceptual import NORMALISERS, PerceptualConfig
from ldm_jax.diffusion.process import ProcessConfig, corrupt, make_process
from ldm_jax.interop.autoencoder_names import diffusers_names, shapes
from ldm_jax.models import autoencoder
from ldm_jax.models.autoencoder import AutoencoderConfig
from ldm_jax.models.latents import PlainCodec, Whitening
from ldm_jax.models.quantizer import QuantizerConfig
from tests.parity import reference

pytestmark = pytest.mark.parity

WIDTHS = (12, 12, 12, 8, 6)  # mid, up0 to up3
BATCH, SIDE, CHANNELS = 3, 8, 4


@functools.cache
def their_convolutions():
    torch.manual_seed(0)
    pairs = zip((CHANNELS, *WIDTHS), WIDTHS, strict=False)
    return [torch.nn.Conv2d(c_in, c_out, 3, padding=1) for c_in, c_out in pairs]


def their_decoder(z):
    """A KL decoder's sides: mid and three blocks that end by doubling it, and one that does not."""
    maps = []
    for level, conv in enumerate(their_convolutions()):
        z = 3 * F.silu(conv(z))  # so that a unit of the latent stays one
        z = F.interpolate(z, scale_factor=2, mode="nearest") if 0 < level < 4 else z
        maps.append(z)
    return maps


def our_decoder(z):
    maps = []
    for level, conv in enumerate(their_convolutions()):
        kernel = jnp.asarray(conv.weight.detach().numpy().transpose(2, 3, 1, 0))
        names = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(z, kernel, (1, 1), "SAME", dimension_numbers=names)
        z = 3 * jax.nn.silu(z + conv.bias.detach().numpy().reshape(1, 1, 1, -1))
        z = z.repeat(2, axis=1).repeat(2, axis=2) if 0 < level < 4 else z
        maps.append(z)
    return maps


def no_outlier(y, tap):
    """[B,C,H,W] -> 1 where a value of the data's map is kept."""
    if tap < 2:
        return torch.ones_like(y)
    opening, closing = (3, 1) if tap == 2 else (5, 3)
    flat = y.flatten(2)
    n = flat.shape[-1]
    low = flat.kthvalue(max(1, int(n * 0.02)), dim=-1).values
    high = flat.kthvalue(int(n * 0.98), dim=-1).values
    margin = 2 * flat.std(dim=-1)
    low, high = (q[:, :, None, None] for q in (low - margin, high + margin))
    kept = ((y > low) & (y < high)).to(y.dtype)
    kept = F.max_pool2d(kept, closing, stride=1, padding=closing // 2)
    return 1 - F.max_pool2d(1 - kept, opening, stride=1, padding=opening // 2)


def moments(x):
    return x.mean((2, 3), keepdim=True), torch.sqrt(
        x.var((2, 3), keepdim=True, unbiased=False) + 1e-6
    )


def by(statistics, x):
    mean, std = statistics
    return (x - mean) / std


def normalised(name, x, y, kept):
    """The prediction's map and the target's, each as it is compared."""
    if name == "none":
        return x, y
    if name == "target_l2":
        norm = torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1e-6
        return x / norm, y / norm
    if name == "separate":
        return by(moments(x * kept), x * kept), by(moments(y), y)
    statistics = {
        "pred_stats": lambda: moments(x),
        "pred_stats_sg": lambda: moments(x.detach()),
        "target_stats": lambda: moments(y),
    }[name]()
    return by(statistics, x), by(statistics, y)


PENALTIES = {
    "l1": torch.abs,
    "l2": torch.square,
    "huber": lambda e: F.huber_loss(e, torch.zeros_like(e), reduction="none"),
}


def their_distance(config, xs, ys):
    """[B], and the share kept at each masked tap [B, taps]."""
    total, shares = 0.0, []
    for tap, (x, y) in enumerate(zip(xs, ys, strict=True)):
        kept = no_outlier(y.detach(), tap)
        if tap >= 2:
            shares.append(kept.mean((1, 2, 3)))
        x, y = normalised(config.normaliser, x, y * kept, kept)
        errors = PENALTIES[config.penalty](x - y) * kept
        each = errors.sum((2, 3))
        if config.reduction == "mean":
            each = each / kept.sum((2, 3)) / len(xs)
        total = total + each.mean(1) * xs[0].shape[-1] / x.shape[-1]
    return total, torch.stack(shares, 1)


def latents():
    """(predicted, target) [B,h,w,C]; a patch and a pixel of the target's are far off."""
    target = reference.draw(1, BATCH, SIDE, SIDE, CHANNELS)
    target[0, 3, 4] *= 40
    target[1, 0, 0] += 60
    return 0.8 * target + 0.6 * reference.draw(2, *target.shape), target


CONFIGS = {
    **{name: PerceptualConfig(normaliser=name) for name in NORMALISERS},
    "l1": PerceptualConfig(penalty="l1"),
    "huber": PerceptualConfig(penalty="huber"),
    "sum": PerceptualConfig(reduction="sum"),
}


@functools.cache
def their_maps():
    """(latent, its maps, the target's maps): those that both compare."""
    predicted, target = (reference.to_torch(z) for z in latents())
    predicted.requires_grad_()
    with torch.no_grad():
        seen = their_decoder(target)
    return predicted, their_decoder(predicted), seen


@functools.cache
def our_answers():
    """By name of a config: loss [B], kept [B], and their weighted sum's gradients."""

    @jax.jit
    def answers(predicted, maps, seen):
        found = {}
        decoded, pullback = jax.vjp(our_decoder, predicted)
        for name, config in CONFIGS.items():

            def distance(maps, config=config):
                answer = perceptual.distance(config, maps, seen, (0, 1, 2, 3, 4))
                return jnp.sum(answer.loss * jnp.arange(1.0, BATCH + 1)), answer

            grads, (loss, kept) = jax.grad(distance, has_aux=True)(maps)
            found[name] = loss, kept, grads, pullback(grads)[0]
        return decoded, found

    _, *both = their_maps()
    maps, seen = ([reference.from_torch(x) for x in found] for found in both)
    decoded, found = answers(latents()[0], maps, seen)
    for ours, theirs in zip(decoded, maps, strict=True):
        assert reference.error(ours, theirs) < 1e-5
    return found


def their_answers(name):
    predicted, maps, seen = their_maps()
    # A map that feeds the next gets a gradient from there too: cut, and joined again. In f64: in
    # f32 two values less one mean may be equal that are not, and l1 then has another slope.
    cut = [x.detach().double().requires_grad_() for x in maps]
    loss, kept = their_distance(CONFIGS[name], cut, [y.double() for y in seen])
    by_maps = torch.autograd.grad((loss * torch.arange(1.0, BATCH + 1)).sum(), cut)
    by_maps = [grad.float() for grad in by_maps]
    (by_latent,) = torch.autograd.grad(maps, predicted, by_maps, retain_graph=True)
    return (
        loss.detach().numpy(),
        kept.numpy(),
        [reference.from_torch(grad) for grad in by_maps],
        reference.from_torch(by_latent),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_reference(name):
    loss, kept, by_maps, by_latent = our_answers()[name]
    their_loss, their_kept, their_by_maps, their_by_latent = their_answers(name)
    # The mask does something at every tap that has one.
    assert (their_kept.min(0) < 0.999).all()
    np.testing.assert_allclose(loss, their_loss, rtol=1e-4)
    np.testing.assert_allclose(kept, their_kept.mean(1), rtol=1e-6)
    for ours, theirs in zip(by_maps, their_by_maps, strict=True):
        assert reference.error(ours, theirs) < 1e-4
    assert reference.error(by_latent, their_by_latent) < 1e-4


DECODERS = {
    "kl": AutoencoderConfig(
        resolution=64, width=8, width_multipliers=(1, 2, 2, 2), num_res_blocks=1, norm_groups=4
    ),
    "vq": AutoencoderConfig(
        "vq",
        resolution=64,
        width=8,
        width_multipliers=(1, 2, 2),
        num_res_blocks=1,
        z_channels=3,
        latent_channels=3,
        norm_groups=4,
        quantizer=QuantizerConfig(codebook_size=64),
    ),
}
TIMES = np.array([0.1, 0.5, 0.9], np.float32)  # of flow matching; the last is behind the gate
WHITE = {"kl": Whitening((0.5,) * 4, (2.0,) * 4), "vq": Whitening((0.1,) * 3, (0.5,) * 3)}


def examples(latent):
    """(z0, noise, what a denoiser says of the velocity), each [B,h,w,C]."""
    shape = DECODERS[latent].latent_shape
    z0, noise, error = (reference.draw(i, BATCH, *shape) for i in (1, 2, 3))
    return z0, noise, noise - z0 + 0.5 * error


def their_features(model, z):
    """What leaves the middle and each level of diffusers' decoder, with all that stands before."""
    if hasattr(model, "quantize"):
        snapped = model.quantize(z)[0]
        z = z + (snapped - z).detach()
    maps, decoder = [], model.decoder
    x = decoder.mid_block(decoder.conv_in(model.post_quant_conv(z)))
    maps.append(x)
    for block in decoder.up_blocks:
        maps.append(block(maps[-1]))
    return maps


def their_total(model, latent, config, output):
    z0, noise, _ = (reference.to_torch(x) for x in examples(latent))
    t = torch.from_numpy(TIMES)[:, None, None, None]
    x0 = (1 - t) * z0 + t * noise - t * output
    shift, scale = WHITE[latent].shift[0], WHITE[latent].scale[0]
    with torch.no_grad():
        seen = their_features(model, z0 * scale + shift)
    loss, _ = their_distance(config, their_features(model, x0 * scale + shift), seen)
    return (loss * (torch.from_numpy(TIMES / (1 - TIMES)) <= config.nsr_max)).sum() / BATCH


@functools.cache
def our_totals(latent):
    """By normaliser: the loss and its gradient by the network's output."""
    model, names = DECODERS[latent], diffusers_names(DECODERS[latent])
    theirs = reference.randomize(reference.first_stage(model), reference.GAINS["plain"])
    params = reference.parameters(theirs, names, shapes(model))
    z0, noise, output = examples(latent)
    process = make_process(ProcessConfig(kind="flow"))
    codec = PlainCodec("gaussian" if latent == "kl" else "point", WHITE[latent])
    z_t = corrupt(process, z0, noise, TIMES)

    def total(config, params, output):
        x0, _ = parameterisation.x0_and_eps(process, "velocity", z_t, output, TIMES)
        maps = len(autoencoder.decoder_taps(model))
        return perceptual.perceptual_loss(
            config,
            lambda z: autoencoder.decoder_maps(model, params, z, maps),
            codec.decode(x0),
            codec.decode(jnp.asarray(z0)),
            perceptual.noise_ratio(process, TIMES),
            jnp.array([0.3, 0.1, 0.2]),
            BATCH,
        ).value

    @jax.jit
    def answers(params, output):
        return {
            name: jax.value_and_grad(
                functools.partial(total, PerceptualConfig(normaliser=name)), 1
            )(params, output)
            for name in NORMALISERS
        }

    return theirs, answers(params, jnp.asarray(output))


@pytest.mark.parametrize("name", NORMALISERS)
@pytest.mark.parametrize("latent", DECODERS)
def test_loss_of_a_prediction_through_a_decoder_is_the_reference(latent, name):
    model, ours = our_totals(latent)
    output = reference.to_torch(examples(latent)[2]).requires_grad_()
    loss = their_total(model, latent, PerceptualConfig(normaliser=name), output)
    loss.backward()
    np.testing.assert_allclose(ours[name][0], loss.item(), rtol=1e-4)
    assert reference.error(ours[name][1], reference.from_torch(output.grad)) < 1e-4
    assert not np.asarray(ours[name][1])[2].any() and np.asarray(ours[name][1])[1].any()
