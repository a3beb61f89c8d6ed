"""The U-Net against diffusers' UNet2DConditionModel and UNet2DModel: same weights, same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ldm_jax.errors import InputError
from ldm_jax.interop import names, unet_names
from ldm_jax.models import unet
from ldm_jax.models.conditions import Signals, Widths
from tests.parity import reference

pytestmark = pytest.mark.parity

SMALL = unet.UNetConfig(
    in_channels=3,
    out_channels=3,
    width=8,
    num_res_blocks=2,
    norm_groups=4,
    compute_dtype="float32",
)


def conditional(**fields):
    """(config, width of the context)."""
    return dataclasses.replace(SMALL, **fields), 6


def unconditional(**fields):
    """(config, 0), heads by width, as diffusers' model counts them."""
    return dataclasses.replace(SMALL, num_heads=0, head_channels=4, **fields), 0


CONFIGS = {
    "class, one head": conditional(
        width_multipliers=(1, 2, 3), attention_factors=(4, 2), num_res_blocks=1
    ),
    "class, heads by width": conditional(
        width_multipliers=(1, 2),
        attention_factors=(1,),
        num_heads=0,
        head_channels=4,
        transformer_depth=2,
        num_res_blocks=1,
    ),
    "unconditional": unconditional(width_multipliers=(1, 2, 3), attention_factors=(4, 2)),
    "unconditional, scale and shift, resampling blocks": unconditional(
        width_multipliers=(1, 2, 2),
        attention_factors=(2,),
        num_res_blocks=1,
        scale_shift_norm=True,
        resample_in_blocks=True,
    ),
}
CLASS = CONFIGS["class, heads by width"]
ADM = CONFIGS["unconditional, scale and shift, resampling blocks"]
TIMES = np.array([3, 741])
Z_T, COTANGENT = reference.draw(1, 2, 8, 12, 3), reference.draw(2, 2, 8, 12, 3)


def shapes(config, context_dim):
    return jax.eval_shape(lambda: unet.init(config, jax.random.key(0), Widths(tokens=context_dim)))


def context_of(context_dim):
    return reference.draw(3, 2, 5, context_dim) if context_dim else None


def their_architecture(config, context_dim):
    if context_dim:
        return reference.conditional_unet(config, context_dim)
    return reference.unconditional_unet(config)


def their_model(config, context_dim, gain):
    return reference.randomize(their_architecture(config, context_dim), reference.GAINS[gain])


@functools.cache
def compiled(config):
    def answers(params, z_t, cotangent, context):
        times = jnp.asarray(TIMES)

        def apply(z_t):
            return unet.apply(config, params, z_t, times, Signals(tokens=context))

        return reference.our_value_and_pullback(apply, z_t, cotangent)

    return jax.jit(answers)


@functools.cache
def our_answers(config, context_dim, gain):
    """The output and its pullback to z_t."""
    model = their_model(config, context_dim, gain)
    name_map = unet_names.unet_names(config, context_dim)
    params = reference.parameters(model, name_map, shapes(config, context_dim))
    return compiled(config)(params, Z_T, COTANGENT, context_of(context_dim))


def errors(config, context_dim, gain="plain", mutate=lambda model: None):
    """Errors of our two answers, `mutate` having spoilt the reference."""
    model = their_model(config, context_dim, gain)
    mutate(model)
    context = context_of(context_dim)
    told = {"encoder_hidden_states": torch.from_numpy(context)} if context_dim else {}
    theirs = reference.value_and_pullback(
        lambda z: model(z, torch.from_numpy(TIMES), **told).sample, Z_T, COTANGENT
    )
    ours = our_answers(config, context_dim, gain)
    return [reference.error(*pair) for pair in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("gain", reference.GAINS)
@pytest.mark.parametrize(("config", "context_dim"), CONFIGS.values(), ids=CONFIGS)
def test_output_and_gradient_are_the_reference(config, context_dim, gain):
    assert max(errors(config, context_dim, gain)) < 1e-4


EPSILONS = [  # whose, names that end so, an epsilon that is not theirs
    (CLASS, "resnets.0.norm1", 1e-6),
    (CLASS, "resnets.0.norm2", 1e-6),
    (CLASS, "norm_out", 1e-6),
    (CLASS, "attentions.0.norm", 1e-5),
    (CLASS, "transformer_blocks.0.norm1", 1e-6),
    (CLASS, "transformer_blocks.0.norm2", 1e-6),
    (CLASS, "transformer_blocks.1.norm3", 1e-6),
    (ADM, "samplers.0.norm1", 1e-6),
    (ADM, "group_norm", 1e-6),
]


@pytest.mark.parametrize(
    ("config", "kind", "epsilon"), EPSILONS, ids=[kind for _, kind, _ in EPSILONS]
)
def test_another_epsilon_is_caught(config, kind, epsilon):
    spoil = functools.partial(reference.set_epsilon, kind=kind, epsilon=epsilon)
    assert min(errors(*config, "faint", spoil)) > 1e-3


@pytest.mark.parametrize("config", [CLASS, ADM], ids=["class", "unconditional"])
def test_another_number_of_heads_is_caught(config):
    def spoil(model):
        for module in model.modules():
            if hasattr(module, "to_q"):
                assert module.heads > 1
                module.heads, module.scale = 1, (module.heads**-0.5) * module.scale

    assert min(errors(*config, "plain", spoil)) > 1e-3


def test_sines_before_cosines_are_caught():
    def spoil(model):
        model.time_proj.flip_sin_to_cos = False

    assert min(errors(*CLASS, "plain", spoil)) > 1e-3


def test_shift_before_scale_is_caught():
    def spoil(model):
        for name, module in model.named_modules():
            if name.endswith("time_emb_proj"):
                module.weight.data, module.bias.data = (
                    torch.roll(p.data, len(p) // 2, 0) for p in (module.weight, module.bias)
                )

    assert min(errors(*ADM, "plain", spoil)) > 1e-3


def test_gate_before_value_is_caught():
    def spoil(model):
        for name, module in model.named_modules():
            if name.endswith("ff.net.0.proj"):
                module.weight.data = torch.roll(module.weight.data, len(module.weight) // 2, 0)

    assert min(errors(*CLASS, "plain", spoil)) > 1e-3


@pytest.mark.parametrize(("config", "context_dim"), CONFIGS.values(), ids=CONFIGS)
def test_names_use_every_tensor_once_and_go_both_ways(config, context_dim):
    name_map = unet_names.unet_names(config, context_dim)
    used = [name for entry in name_map.values() for name in entry.theirs]
    theirs = reference.tensors(their_architecture(config, context_dim))
    assert sorted(used) == sorted(theirs)
    ours = names.to_ours(name_map, theirs, shapes(config, context_dim))
    back = names.to_theirs(name_map, ours)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_names_refuse_what_the_reference_cannot_express():
    config = dataclasses.replace(CLASS[0], resample_in_blocks=True)
    with pytest.raises(InputError, match="resample_in_blocks"):
        unet_names.unet_names(config, 6)
