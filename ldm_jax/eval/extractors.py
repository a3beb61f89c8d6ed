"""Feature extractors by name: uint8 images to vectors, the network and its resize together.

A figure of other weights, another resize or another tap is another figure: results name all three
and the digest of the weights. Jobs load the parameters (`interop/pretrained.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ldm_jax.errors import InputError, choose
from ldm_jax.eval import random_conv
from ldm_jax.eval.resize import RESIZES
from ldm_jax.models.frozen import clip, dinov2, inception, vgg

Features = dict[str, jax.Array]  # {tap: f32 [B,D]}


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A frozen network; its name is also that of its weights."""

    name: str
    taps: dict[str, int]  # {tap: D}
    side: int  # pixels that images are resized to
    resize: str  # the one that published figures of this network use most
    network: Callable[[Any, jax.Array], Features]  # (params, f32 [B,side,side,3] in 0..255)
    shapes: Callable[[], Any]  # the tree of parameters as shapes
    # () -> the parameters of a network that needs no file; None for the others.
    init: Callable[[], Any] | None = None

    def apply(self, params: Any, images: jax.Array, resize: str = "") -> Features:
        """uint8 images [B,H,W,3] -> {tap: f32 [B,D]}; an empty `resize` is the extractor's own.

        Raises InputError for images that are not uint8, and for an unknown resize.
        """
        if images.dtype != "uint8" or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(
                f"{self.name} got images {images.dtype} {images.shape}: the rule is uint8 "
                "[B,H,W,3], rounded as they are saved; convert with autoencoder.to_uint8"
            )
        resize = resize or self.resize
        choose("resize", resize, RESIZES)
        return self.network(params, RESIZES[resize](images, self.side))


def _clip(name: str, config: clip.ClipConfig) -> Extractor:
    return Extractor(
        name,
        {"image_embeds": config.embed_dim},
        config.resolution,
        "torch_bicubic_aa",
        lambda params, x: {"image_embeds": clip.image_features(config, params, x)},
        lambda: clip.shapes(config),
    )


EXTRACTORS = {
    extractor.name: extractor
    for extractor in (
        Extractor(
            "inception",
            inception.TAPS,
            inception.SIDE,
            "tf1_bilinear",
            inception.apply,
            inception.shapes,
        ),
        Extractor("vgg16", vgg.TAPS, vgg.SIDE, "tf1_bilinear", vgg.apply, vgg.shapes),
        _clip("clip-vit-b32", clip.VIT_B32),
        _clip("clip-vit-l14-336", clip.VIT_L14_336),
        Extractor(
            "dinov2-vitl14",
            {"cls": dinov2.VIT_L14.width},
            dinov2.SIDE,
            "torch_bicubic_aa",
            lambda params, x: {"cls": dinov2.apply(dinov2.VIT_L14, params, x)},
            lambda: dinov2.shapes(dinov2.VIT_L14),
        ),
        Extractor(
            "random-conv",
            {"quarters": random_conv.DIM},
            64,
            "torch_bicubic_aa",
            lambda params, x: {"quarters": random_conv.apply(params, x / 127.5 - 1.0)},
            lambda: jax.eval_shape(lambda: random_conv.init(0)),
            lambda: random_conv.init(0),
        ),
    )
}
