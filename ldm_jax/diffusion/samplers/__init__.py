"""Samplers: from noise to data, each one `lax.scan`, along a `Grid` computed on the host.

Every entry is called (predict, grid, z_T, cond, keys, **options) -> z0 [B, H, W, C], where predict
is `parameterisation.predictor`'s and z_T is `Grid.start`'s: the guidance, the parameterisation and
the process come in through these, so one sampler serves all.
"""

import inspect
from collections.abc import Callable
from typing import Any

from ldm_jax.diffusion.samplers.heun import edm, heun
from ldm_jax.diffusion.samplers.loop import Known
from ldm_jax.diffusion.samplers.multistep import dpmpp_1s, dpmpp_2m, dpmpp_2m_sde, plms
from ldm_jax.diffusion.samplers.single_step import ddim, ddpm, euler, euler_ancestral, sde_flow
from ldm_jax.diffusion.samplers.unipc import unipc

SAMPLERS: dict[str, Callable[..., Any]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "edm": edm,
    "dpmpp_1s": dpmpp_1s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "sde_flow": sde_flow,
}


def options(name: str) -> tuple[str, ...]:
    """The options of a sampler by its name, beside `known` and `every`, which all have."""
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


__all__ = [
    "SAMPLERS",
    "Known",
    "ddim",
    "ddpm",
    "dpmpp_1s",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "edm",
    "euler",
    "euler_ancestral",
    "heun",
    "options",
    "plms",
    "sde_flow",
    "unipc",
]
