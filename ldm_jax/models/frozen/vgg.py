"""VGG16 up to its second dense layer: the features of improved precision and recall.

Simonyan and Zisserman, ICLR 2015; Kynkäänniemi et al., NeurIPS 2019, section 2. The convolutions
are the trunk that LPIPS looks at.
"""

from typing import Any

import jax

from ldm_jax.models.frozen import lpips as perceptual_net
from ldm_jax.models.frozen.vit import leaf

SIDE = 224  # pixels
TAPS = {"fc2_relu": 4096}


def shapes() -> dict[str, Any]:
    """The tree of parameters as shapes: the trunk's, and kernels and biases of fc1 and fc2."""
    tree = perceptual_net.trunk_shapes()
    inputs = (SIDE // 2 ** len(perceptual_net.BLOCKS)) ** 2 * perceptual_net.BLOCKS[-1][-1]
    for name in ("fc1", "fc2"):
        width = TAPS["fc2_relu"]
        tree[name] = {"kernel": leaf(inputs, width), "bias": leaf(width)}
        inputs = width
    return tree


def apply(params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """Images f32 [B,224,224,3] in 0..255 -> {"fc2_relu": f32 [B,4096]}, after the ReLU."""
    with jax.default_matmul_precision("highest"):  # else accelerators round to bf16 or TF32
        h = perceptual_net.features(params, x / 127.5 - 1.0)[-1]
        h = perceptual_net.max_pool(h).reshape(len(x), -1)  # [B,H,W,C] -> [B,H*W*C]
        for name in ("fc1", "fc2"):
            h = jax.nn.relu(h @ params[name]["kernel"] + params[name]["bias"].reshape(1, -1))
    return {"fc2_relu": h}
