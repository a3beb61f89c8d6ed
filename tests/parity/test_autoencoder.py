"""First stages against diffusers' AutoencoderKL and VQModel: same weights, same numbers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.interop import names
from ldm_jax.interop.autoencoder_names import diffusers_names, shapes
from ldm_jax.models import autoencoder, quantizer
from tests.parity import reference

pytestmark = pytest.mark.parity

SMALL = autoencoder.AutoencoderConfig(
    resolution=32,
    width=8,
    num_res_blocks=2,
    norm_groups=4,
    quantizer=quantizer.QuantizerConfig(codebook_size=64),
    compute_dtype="float32",
)
VQ = dict(latent="vq", num_res_blocks=1)
# The published levels; attention sits where a 256-pixel image would have it.
CONFIGS = {
    "kl-f4": dict(width_multipliers=(1, 2, 4), z_channels=3, latent_channels=3),
    "kl-f8": dict(width_multipliers=(1, 2, 4, 4)),
    "kl-f16": dict(
        width_multipliers=(1, 1, 2, 2, 4),
        attention_resolutions=(2,),
        num_res_blocks=1,
        z_channels=16,
        latent_channels=16,
    ),
    "attends inside": dict(
        width_multipliers=(1, 2, 2), attention_resolutions=(16, 8), num_res_blocks=1
    ),
    "kl-f4 without attention": dict(
        width_multipliers=(1, 2, 4), middle_attention=False, num_res_blocks=1
    ),
    "vq-f4": dict(VQ, width_multipliers=(1, 2, 4), z_channels=3, latent_channels=3),
    "vq-f4 without attention": dict(
        VQ, width_multipliers=(1, 2, 4), z_channels=3, latent_channels=3, middle_attention=False
    ),
    "vq-f8": dict(VQ, width_multipliers=(1, 2, 2, 4), attention_resolutions=(4,)),
    "vq-f4, narrower latent": dict(VQ, width_multipliers=(1, 2, 2), latent_channels=2),
}
CONFIGS = {name: dataclasses.replace(SMALL, **fields) for name, fields in CONFIGS.items()}
SMALLEST = CONFIGS["attends inside"]


def inputs(config):
    """An image and a latent, and cotangents of what becomes of them."""
    x = reference.draw(1, 2, config.resolution, config.resolution, 3)
    z = reference.draw(2, 2, *config.latent_shape)
    moments = reference.draw(3, *z.shape[:3], config.moment_channels)
    return x, moments, z, reference.draw(4, *x.shape)


def their_model(config, gain):
    return reference.randomize(reference.first_stage(config), reference.GAINS[gain])


def our_decode(config, params, z):
    """`decode` with the gradient that training takes; diffusers' VQModel decodes so too."""
    if config.latent == "vq":
        z = quantizer.straight_through(z, quantizer.quantize(params["quantizer"]["codebook"], z)[0])
        return autoencoder.to_image(config, params, autoencoder.decode_features(config, params, z))
    return autoencoder.decode(config, params, z)


@functools.cache
def compiled(config):
    def answers(params, x, moments, z, image):
        encode = functools.partial(autoencoder.encode, config, params)
        decode = functools.partial(our_decode, config, params)
        return (
            *reference.our_value_and_pullback(encode, x, moments),
            *reference.our_value_and_pullback(decode, z, image),
        )

    return jax.jit(answers)


@functools.cache
def our_answers(config, gain):
    """Moments, their pullback to the image, the decoded image, its pullback to the latent."""
    model = their_model(config, gain)
    params = reference.parameters(model, diffusers_names(config), shapes(config))
    return compiled(config)(params, *inputs(config))


def errors(config, gain, mutate=lambda model: None):
    """Errors of our four answers, `mutate` having spoilt the reference."""
    model = their_model(config, gain)
    mutate(model)
    x, moments, z, image = inputs(config)
    encode = {
        "kl": lambda x: model.encode(x).latent_dist.parameters,
        "vq": lambda x: model.encode(x).latents,
    }[config.latent]

    def decode(z):
        return model.decode(z).sample

    theirs = (
        *reference.value_and_pullback(encode, x, moments),
        *reference.value_and_pullback(decode, z, image),
    )
    return [reference.error(*pair) for pair in zip(our_answers(config, gain), theirs, strict=True)]


@pytest.mark.parametrize("gain", reference.GAINS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_encode_and_decode_and_their_gradients_are_the_reference(config, gain):
    assert max(errors(config, gain)) < 1e-4


def test_decoding_for_use_snaps_to_the_codebook_as_the_reference_does():
    config = CONFIGS["vq-f4 without attention"]
    model = their_model(config, "plain")
    params = reference.parameters(model, diffusers_names(config), shapes(config))
    z = inputs(config)[2]
    ours = jax.jit(functools.partial(autoencoder.decode, config))(params, z)
    theirs = reference.from_torch(model.decode(reference.to_torch(z)).sample)
    assert reference.error(ours, theirs) < 1e-4


def test_decoding_without_the_codebook_is_caught():
    def spoil(model):
        model.decode = functools.partial(model.decode, force_not_quantize=True)

    assert min(errors(CONFIGS["vq-f4 without attention"], "plain", spoil)[2:]) > 1e-3


@pytest.mark.parametrize("kind", ["resnets.0.norm1", "resnets.1.norm2", "group_norm", "norm_out"])
def test_another_epsilon_is_caught(kind):
    spoil = functools.partial(reference.set_epsilon, kind=kind, epsilon=1e-5)
    assert min(errors(SMALLEST, "faint", spoil)) > 1e-3


def test_symmetric_padding_is_caught():
    def spoil(model):
        for block in model.encoder.down_blocks:
            for downsample in block.downsamplers or ():
                downsample.padding, downsample.conv.padding = 1, (1, 1)

    assert min(errors(SMALLEST, "plain", spoil)[:2]) > 1e-3


@pytest.mark.parametrize("where", ["mid_block.attentions.0", "blocks.1.attentions.0"])
def test_queries_and_keys_swapped_are_caught(where):
    def spoil(model):
        for name, module in model.named_modules():
            if name.endswith(where):
                module.to_q, module.to_k = module.to_k, module.to_q

    assert min(errors(SMALLEST, "plain", spoil)) > 1e-3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_use_every_tensor_once_and_go_both_ways(config):
    name_map = diffusers_names(config)
    used = [name for entry in name_map.values() for name in entry.theirs]
    theirs = reference.tensors(reference.first_stage(config))
    assert sorted(used) == sorted(theirs)
    back = names.to_theirs(name_map, names.to_ours(name_map, theirs, shapes(config)))
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_names_refuse_a_checkpoint_of_another_architecture():
    theirs = reference.tensors(reference.first_stage(SMALLEST))
    for fields, match in (
        (dict(num_res_blocks=2), "missing"),
        (dict(attention_resolutions=()), "unknown"),
        (dict(width=16), "shape"),
    ):
        config = dataclasses.replace(SMALLEST, **fields)
        with pytest.raises(InputError, match=match):
            names.to_ours(diffusers_names(config), theirs, shapes(config))
    with pytest.raises(InputError, match="latent_channels"):
        diffusers_names(dataclasses.replace(SMALLEST, latent_channels=3))
