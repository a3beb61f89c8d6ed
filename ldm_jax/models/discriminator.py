"""The patch discriminator (Isola et al., CVPR 2017): an image to a map of real-or-not logits.

Layers, widths, starting values and norms as in the published first stages. Batch norm takes its
statistics over the *global* batch: a sharded step computes what one device would, whereas the
published training took them on each GPU alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.errors import choose, within
from ldm_jax.models.layers import (
    COMPUTE_DTYPES,
    Declared,
    draw_parameters,
    parameter_axes,
    resolve_dtype,
)
from ldm_jax.sharding import constrain

NORMS = ("batch", "act", "none")
MOMENTUM, EPSILON = 0.1, 1e-5  # of batch norm's running statistics, and under its root


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    width: int = 64  # channels of the first layer; they double up to eightfold
    num_layers: int = 3  # strided ones; 3 sees 70 pixels, 2 sees 34
    norm: str = "batch"  # "batch" | "act" scale and shift set from the first batch | "none"
    compute_dtype: str = "auto"

    def __post_init__(self):
        choose("discriminator norm", self.norm, NORMS)
        choose("discriminator compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        for name in ("width", "num_layers"):
            within(f"discriminator {name}", getattr(self, name), "[1, inf)")


def _layers(config: DiscriminatorConfig, channels: int) -> list[tuple[str, int, int, int, bool]]:
    """(name, channels in, channels out, stride, has norm) of each 4x4 convolution."""
    widths = [config.width * min(2**i, 8) for i in range(config.num_layers + 1)]
    layers = [("conv0", channels, widths[0], 2, False)]
    for i in range(1, config.num_layers + 1):
        stride = 2 if i < config.num_layers else 1
        layers.append((f"conv{i}", widths[i - 1], widths[i], stride, config.norm != "none"))
    return [*layers, ("logits", widths[-1], 1, 1, False)]


def _declared(config: DiscriminatorConfig, channels: int) -> Any:
    declared = {}
    for name, c_in, c_out, _, has_norm in _layers(config, channels):
        shape = (4, 4, c_in, c_out)
        names = (None, None, "in_channels", "out_channels" if c_out > 1 else None)
        declared[name] = {"kernel": Declared(jnp.zeros(shape), names, 0.02, 0.0, normal=True)}
        if not has_norm:
            scale = (16 * c_in) ** -0.5  # PyTorch's default, which the published init leaves alone
            declared[name]["bias"] = Declared(jnp.zeros(c_out), (None,), scale, 0.0)
        elif config.norm == "batch":
            scale = Declared(jnp.zeros(c_out), (None,), 0.02, 1.0, normal=True)
            declared[name]["norm"] = {"scale": scale, "bias": _constant(c_out, 0.0)}
        else:
            declared[name]["norm"] = {"scale": _constant(c_out, 1.0), "bias": _constant(c_out, 0.0)}
    return declared


def _constant(size, value):
    return Declared(jnp.zeros(size), (None,), 0.0, value)


def init(config: DiscriminatorConfig, key: jax.Array, channels: int = 3) -> Any:
    """Parameters as nested dicts of f32 arrays, for images of so many channels."""
    return draw_parameters(_declared(config, channels), key)


def axes(config: DiscriminatorConfig, channels: int = 3) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return parameter_axes(_declared(config, channels))


def init_statistics(config: DiscriminatorConfig, channels: int = 3) -> Any:
    """Running mean and variance of each batch norm; empty for other norms.

    Training never reads them: they are for whoever runs the discriminator on single images.
    """
    if config.norm != "batch":
        return {}
    return {
        name: {"mean": jnp.zeros(c_out), "variance": jnp.ones(c_out)}
        for name, _, c_out, _, has_norm in _layers(config, channels)
        if has_norm
    }


def apply(config: DiscriminatorConfig, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Images f32 [B,H,W,3] in [-1,1] -> logits f32 [B,h,w,1] and the batch's statistics.

    Statistics have the tree of `init_statistics`, with unbiased variances.
    """
    statistics = {}

    def norm(name, p, h):
        if config.norm == "act":
            return _affine(h + _row(p["bias"]), p["scale"], 0.0)
        mean = h.mean((0, 1, 2))
        variance = jnp.square(h - _row(mean)).mean((0, 1, 2))
        count = h.size // h.shape[-1]
        unbiased = variance * (count / max(count - 1, 1))
        statistics[name] = jax.lax.stop_gradient({"mean": mean, "variance": unbiased})
        h = (h - _row(mean)) * _row(jax.lax.rsqrt(variance + EPSILON))
        return _affine(h, p["scale"], p["bias"])

    return _forward(config, params, x, norm), statistics


def update_statistics(running: Any, batch: Any) -> Any:
    """Running statistics after one more batch, momentum 0.1 as PyTorch's batch norm."""
    return jax.tree.map(lambda r, b: (1 - MOMENTUM) * r + MOMENTUM * b, running, batch)


def start_act_norm(config: DiscriminatorConfig, params: Any, x: jax.Array) -> Any:
    """Parameters whose act norms give mean 0 and deviation 1 on the batch x [B,H,W,3].

    y = scale * (h + bias), as published. Kingma & Dhariwal, NeurIPS 2018, sec. 3.1.
    """
    started = dict(params)

    def norm(name, p, h):
        mean = h.mean((0, 1, 2))
        count = h.size // h.shape[-1]
        variance = jnp.square(h - _row(mean)).sum((0, 1, 2)) / max(count - 1, 1)
        p = {"scale": 1 / (jnp.sqrt(variance) + 1e-6), "bias": -mean}
        started[name] = params[name] | {"norm": p}
        return _affine(h + _row(p["bias"]), p["scale"], 0.0)

    _forward(config, params, x, norm)
    return started


def _forward(config, params, x, norm):
    dtype = resolve_dtype(config.compute_dtype)
    h = constrain(x, "batch", "height", "width", "channels")
    for name, _, _, stride, has_norm in _layers(config, x.shape[-1]):
        p = params[name]
        kernel = constrain(p["kernel"].astype(dtype), None, None, None, None)
        h = jax.lax.conv_general_dilated(
            h.astype(dtype),
            kernel,
            window_strides=(stride, stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).astype(jnp.float32)
        h = constrain(h, "batch", "height", "width", None)
        h = norm(name, p["norm"], h) if has_norm else h + _row(p["bias"])
        if name != "logits":
            h = jnp.where(h > 0, h, 0.2 * h)
    return h


def _row(v):
    return v.reshape(1, 1, 1, -1)


def _affine(h, scale, bias):
    return h * _row(scale) + (_row(bias) if jnp.ndim(bias) else bias)
