"""Tensors of CLIP and DINOv2 by the names of Hugging Face's files -> our trees; numpy only."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.interop.names import CONV, LINEAR, SAME, Entry, Names, Transform, to_ours
from ldm_jax.models.frozen import clip, dinov2

Tensors = Mapping[str, np.ndarray]

ONE_ROW = Transform(lambda a: a.reshape(-1), lambda a: (a.reshape(1, 1, -1),))
ONE_MAP = Transform(lambda a: a[0], lambda a: (a[None],))


def clip_params(config: clip.ClipConfig, tensors: Tensors) -> Any:
    """The tensors of a CLIPModel -> the tree of clip."""
    linear = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    norms = {"norm1": "layer_norm1", "norm2": "layer_norm2"}
    names: Names = {}
    for tower, layers in (("vision", config.vision.layers), ("text", config.text.layers)):
        start = f"{tower}_model.encoder.layers"
        names |= _blocks(f"{tower}/blocks", start, layers, linear, norms)
        names[f"{tower}/position"] = _same(f"{tower}_model.embeddings.position_embedding.weight")
    vision = "vision_model.embeddings"
    names |= {
        "vision/patch": Entry((f"{vision}.patch_embedding.weight",), CONV),
        "vision/class": _same(f"{vision}.class_embedding"),
        # The missing letter is theirs.
        **_norm("vision/norm_in", "vision_model.pre_layrnorm"),
        **_norm("vision/norm_out", "vision_model.post_layernorm"),
        "vision/projection": Entry(("visual_projection.weight",), LINEAR),
        "text/token": _same("text_model.embeddings.token_embedding.weight"),
        **_norm("text/norm_out", "text_model.final_layer_norm"),
        "text/projection": Entry(("text_projection.weight",), LINEAR),
    }
    return to_ours(names, tensors, clip.shapes(config))


def dinov2_params(config: dinov2.DinoConfig, tensors: Tensors) -> Any:
    """The tensors of a Dinov2Model as it is saved -> the tree of dinov2."""
    linear = {
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "out": "attention.output.dense",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    norms = {"norm1": "norm1", "norm2": "norm2"}
    names = _blocks("blocks", "encoder.layer", config.layers, linear, norms)
    for i in (1, 2):
        scales = [f"encoder.layer.{n}.layer_scale{i}.lambda1" for n in range(config.layers)]
        names[f"blocks/scale{i}"] = Entry(tuple(scales), _stacked(SAME))
    names |= {
        "patch/kernel": Entry(("embeddings.patch_embeddings.projection.weight",), CONV),
        "patch/bias": _same("embeddings.patch_embeddings.projection.bias"),
        "class": Entry(("embeddings.cls_token",), ONE_ROW),
        "position": Entry(("embeddings.position_embeddings",), ONE_MAP),
        **_norm("norm_out", "layernorm"),
    }
    return to_ours(names, tensors, dinov2.shapes(config))


def _blocks(
    ours: str, theirs: str, layers: int, linear: dict[str, str], norms: dict[str, str]
) -> Names:
    """The parameters of all blocks, each stacked over the layers."""
    names: Names = {}
    parts = [(o, t, "kernel", LINEAR) for o, t in linear.items()]
    parts += [(o, t, "scale", SAME) for o, t in norms.items()]
    for our, their, weight, transform in parts:
        tensors = [f"{theirs}.{n}.{their}" for n in range(layers)]
        weights, biases = (tuple(f"{t}.{end}" for t in tensors) for end in ("weight", "bias"))
        names[f"{ours}/{our}/{weight}"] = Entry(weights, _stacked(transform))
        names[f"{ours}/{our}/bias"] = Entry(biases, _stacked(SAME))
    return names


def _stacked(each: Transform) -> Transform:
    """A tensor for each of L layers <-> one array [L,...]."""
    return Transform(
        lambda *tensors: np.stack([each.to_ours(a) for a in tensors]),
        lambda array: tuple(each.to_theirs(a)[0] for a in array),
    )


def _norm(ours: str, theirs: str) -> Names:
    return {f"{ours}/scale": _same(f"{theirs}.weight"), f"{ours}/bias": _same(f"{theirs}.bias")}


def _same(theirs: str) -> Entry:
    return Entry((theirs,), SAME)
