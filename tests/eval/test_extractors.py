"""Every extractor gives what its taps promise; a changed number of one needs new golden values.

PYTHONPATH=. python tests/eval/test_extractors.py        # rewrites tests/golden/extractors.json
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.extractors import EXTRACTORS
from ldm_jax.eval.resize import RESIZES
from ldm_jax.interop import pretrained
from ldm_jax.models.frozen import clip, dinov2, inception, vgg
from tests import frozen

GOLDEN = Path(__file__).parents[1] / "golden" / "extractors.json"
CLIP = clip.ClipConfig(clip.Tower(8, 2, 2), clip.Tower(8, 2, 2), 8, 4, 6, vocabulary=11, context=5)
DINO = dinov2.DinoConfig(8, 2, 2, patch=4, grid=3)


def pictures(side):
    """Waves of uint8 [2,S,S,3], the same on every machine."""
    y, x, c = np.mgrid[:side, :side, :3]
    waves = 128 + 60 * np.sin(0.3 * y + c) + 60 * np.cos(0.2 * x * (1 + c))
    return np.stack([waves, waves.transpose(1, 0, 2)]).round().astype(np.uint8)


def weights(shapes):
    """Uniform numbers for a tree of shapes; kernels keep the size of what passes through."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = 2 * rng.random(leaf.shape, np.float32) - 1
        if path[-1].key in ("scale", "scale1", "scale2"):
            return 1 + 0.3 * values
        fan_in = np.prod(leaf.shape[-4:-1]) if path[-1].key == "kernel" else 4
        return values * np.float32((3 / fan_in) ** 0.5)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def small_features():
    """{network: its features} with few channels and small images; one compilation each."""
    tokens = np.array([[9, 2, 3, 10, 0], [9, 10, 0, 0, 0]], np.int32)

    def run(network, params, x):
        return jax.device_get(jax.jit(network)(params, x))

    x = {side: pictures(side).astype(np.float32) for side in (8, 16, 75)}
    with pytest.MonkeyPatch.context() as patch:
        frozen.narrow(patch)
        folded = pretrained.from_tensors("inception", frozen.fid_inception())
        out = run(inception.apply, folded, x[75])
        patch.setattr(vgg, "SIDE", 32)
        out |= run(vgg.apply, weights(vgg.shapes()), pictures(32).astype(np.float32))
    params = weights(clip.shapes(CLIP))
    random_conv = EXTRACTORS["random-conv"]
    return out | {
        "clip_image": run(lambda p, x: clip.image_features(CLIP, p, x), params, x[8]),
        "clip_text": run(lambda p, t: clip.text_features(CLIP, p, t), params, tokens),
        "dinov2": run(lambda p, x: dinov2.apply(DINO, p, x), weights(dinov2.shapes(DINO)), x[16]),
        "quarters": run(random_conv.apply, random_conv.init(), pictures(16))["quarters"],
    }


def summary(features):
    """Enough of each vector to notice any change."""
    numbers = {}
    for name, rows in features.items():
        rows = np.asarray(rows, np.float64)
        waves = np.cos(np.arange(rows.shape[-1]))
        numbers[name] = [*rows.mean(-1), *(rows @ waves / len(waves)), *rows[0, :3], *rows[1, -3:]]
    return {name: [float(v) for v in values] for name, values in numbers.items()}


def test_features_are_the_golden_ones():
    golden = json.loads(GOLDEN.read_text())
    found = summary(small_features())
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert np.ptp(values) > 1e-3, name
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", EXTRACTORS)
@pytest.mark.parametrize("resize", RESIZES)
def test_every_resize_leads_to_the_promised_taps(name, resize):
    extractor = EXTRACTORS[name]
    assert extractor.name == name
    assert extractor.resize in RESIZES
    images = jax.ShapeDtypeStruct((2, 50, 40, 3), jnp.uint8)
    found = jax.eval_shape(
        lambda params, x: extractor.apply(params, x, resize), extractor.shapes(), images
    )
    assert {tap: (2, width) for tap, width in extractor.taps.items()} == {
        tap: leaf.shape for tap, leaf in found.items()
    }
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.float32)}


def precisions(jaxpr):
    """The precision of every product in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from precisions(inner)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_no_product_is_rounded_on_an_accelerator(name):
    extractor = EXTRACTORS[name]
    images = jax.ShapeDtypeStruct((1, 50, 40, 3), jnp.uint8)
    found = list(precisions(jax.make_jaxpr(extractor.apply)(extractor.shapes(), images).jaxpr))
    assert found
    assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_extractors_with_files_are_those_that_can_be_fetched():
    with_files = {name for name, e in EXTRACTORS.items() if e.init is None}
    assert with_files == pretrained.NETWORKS.keys() - {"lpips"}
    for name in with_files:
        assert jax.tree.structure(EXTRACTORS[name].shapes()) == jax.tree.structure(
            pretrained.NETWORKS[name].shapes()
        )


def test_the_networks_are_of_the_published_sizes():
    """Numbers of parameters that the publications and their files have."""

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(clip.shapes(clip.VIT_B32)) == 151_277_313 - 1  # the logits' scale
    assert count(clip.shapes(clip.VIT_L14_336)) == 427_944_193 - 1
    assert count(dinov2.shapes(dinov2.VIT_L14)) == 304_368_640 - 1024  # the mask token
    assert count(vgg.shapes()) == 138_357_544 - 4_097_000  # the classes


def test_images_that_were_not_rounded_are_refused():
    extractor = EXTRACTORS["random-conv"]
    params = extractor.init()
    for images in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(InputError, match=r"the rule is uint8 \[B,H,W,3\]"):
            extractor.apply(params, images)
    with pytest.raises(InputError, match=r"'lanczos' is unknown; choose one of \['tf1_bilinear"):
        extractor.apply(params, pictures(8), "lanczos")


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(summary(small_features()), indent=1) + "\n")
