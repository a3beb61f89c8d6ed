"""The reference models of diffusers that our configs describe, with weights worth comparing."""

from typing import Any

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel

from ldm_jax.interop import names
from ldm_jax.models import autoencoder, unet

torch.set_num_threads(1)  # the models are small, and spinning threads slow the other worker down

# Weights that keep the signal near variance 1 show wiring. Weights that bring what the norms see
# near their epsilons show those: at variance 1, 1e-5 instead of 1e-6 stays unseen.
GAINS = {"plain": 1.0, "faint": 1e-3}
# What turns normalized signals into summands of a residual stream, and what passes streams on.
WRITERS = (
    "conv_in.",
    ".conv1.",
    ".conv2.",
    ".time_emb_proj.",
    ".to_out.",
    ".proj_in.",
    ".ff.net.2.",
)
CARRIERS = (".conv_shortcut.", "samplers.0.conv.", ".proj_out.")
SHARP = (".to_q.", ".to_k.")  # else attention is uniform, and nothing in it is seen


def first_stage(config: autoencoder.AutoencoderConfig) -> torch.nn.Module:
    """The AutoencoderKL or VQModel of the same architecture."""
    levels = range(len(config.width_multipliers))
    attends = [config.resolution // 2**i in config.attention_resolutions for i in levels]
    fields = dict(
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        down_block_types=[f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        up_block_types=[f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
        block_out_channels=[config.width * m for m in config.width_multipliers],
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_groups,
        sample_size=config.resolution,
        mid_block_add_attention=config.middle_attention,
    )
    if config.latent == "kl":
        return AutoencoderKL(**fields)
    return VQModel(
        **fields,
        num_vq_embeddings=config.quantizer.codebook_size,
        vq_embed_dim=config.latent_channels,
    )


def conditional_unet(config: unet.UNetConfig, context_dim: int) -> torch.nn.Module:
    """The UNet2DConditionModel of the same architecture; its attention_head_dim counts heads."""
    widths = [config.width * m for m in config.width_multipliers]
    attends = [2**i in config.attention_factors for i in range(len(widths))]
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=[f"{'CrossAttn' * a}DownBlock2D" for a in attends],
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=[f"{'CrossAttn' * a}UpBlock2D" for a in reversed(attends)],
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        attention_head_dim=[config.heads(width) for width in widths],
        transformer_layers_per_block=config.transformer_depth,
        cross_attention_dim=context_dim,
        use_linear_projection=False,
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        norm_num_groups=config.norm_groups,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
    )


def unconditional_unet(config: unet.UNetConfig) -> torch.nn.Module:
    """The UNet2DModel of the same architecture; its attention_head_dim is a width."""
    widths = [config.width * m for m in config.width_multipliers]
    attends = [2**i in config.attention_factors for i in range(len(widths))]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    plain = plain if config.resample_in_blocks else ("DownBlock2D", "UpBlock2D")
    return UNet2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=["AttnDownBlock2D" if a else plain[0] for a in attends],
        up_block_types=["AttnUpBlock2D" if a else plain[1] for a in reversed(attends)],
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        attention_head_dim=config.head_channels,
        downsample_type="resnet" if config.resample_in_blocks else "conv",
        upsample_type="resnet" if config.resample_in_blocks else "conv",
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        norm_num_groups=config.norm_groups,
        # Left out, the middle's attention loses its norm when time scales and shifts.
        attn_norm_num_groups=config.norm_groups,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
    )


def randomize(module: torch.nn.Module, gain: float = 1.0) -> torch.nn.Module:
    """Draws every parameter, so that none is zero or one; residual streams are `gain` in size."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            values = rng.standard_normal(p.shape)
            if p.ndim > 1:
                values *= 2.0 if any(x in name for x in SHARP) else 1.0
                values *= gain if any(x in name for x in WRITERS) else 1.0
                values /= np.sqrt(p[0].numel())
            elif "norm" in name:
                values = 0.3 * values + name.endswith("weight")
            else:
                values *= 0.3 * (gain if any(x in name for x in WRITERS + CARRIERS) else 1.0)
            p.copy_(torch.from_numpy(values))
    return module.eval()


def set_epsilon(module: torch.nn.Module, kind: str, epsilon: float) -> None:
    """Gives every norm of a name that ends in `kind` another epsilon."""
    norms = [m for name, m in module.named_modules() if name.endswith(kind)]
    assert norms and all(m.eps != epsilon for m in norms)
    for norm in norms:
        norm.eps = epsilon


def tensors(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def parameters(module: torch.nn.Module, name_map: names.Names, shapes: Any) -> Any:
    """The module's weights as our tree."""
    return names.to_ours(name_map, tensors(module), shapes)


def value_and_pullback(f: Any, x: np.ndarray, cotangent: np.ndarray) -> tuple[Any, Any]:
    """f(x) and the gradient of <f(x), cotangent>, by torch; NHWC outside, NCHW for f."""
    x = to_torch(x).requires_grad_()
    y = f(x)
    y.backward(to_torch(cotangent))
    return from_torch(y), from_torch(x.grad)


def our_value_and_pullback(f: Any, x: jax.Array, cotangent: jax.Array) -> tuple[Any, Any]:
    """f(x) and the gradient of <f(x), cotangent>, by jax."""
    y, pullback = jax.vjp(f, x)
    return y, pullback(cotangent)[0]


def to_torch(x: np.ndarray) -> torch.Tensor:
    """[B,H,W,C] -> [B,C,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def from_torch(x: torch.Tensor) -> np.ndarray:
    """[B,C,H,W] -> [B,H,W,C]."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value of the reference."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
