"""CLIP and DINOv2 against transformers: small random models, through the files it saves."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ldm_jax.interop import vit_names
from ldm_jax.models.frozen import clip, dinov2
from tests.parity import reference

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
CLIP = clip.ClipConfig(
    clip.Tower(24, 2, 3), clip.Tower(16, 2, 2), 20, 5, 12, vocabulary=30, context=9
)
# transformers keeps them apart from its models; here as it has them in image_utils.
CLIP_MEAN, CLIP_STD = (np.array(v) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
DINO_MEAN, DINO_STD = (np.array(v) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
DINO = dinov2.DinoConfig(24, 2, 3, patch=5, grid=7, position_offset=0.0)


def saved(model, folder):
    """The tensors as the published files name them."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def tower(config, **more):
    return dict(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        **more,
    )


def pixels(size, mean, std):
    """uint8-like f32 images [2,S,S,3] in 0..255, and what transformers' processor makes of them."""
    x = np.random.default_rng(size).integers(0, 256, (2, size, size, 3)).astype(np.float32)
    return x, reference.to_torch(((x / 255 - mean) / std).astype(np.float32))


@pytest.fixture(scope="module")
def clip_pair(tmp_path_factory):
    config = CLIPConfig(
        text_config=tower(
            CLIP.text,
            vocab_size=CLIP.vocabulary,
            max_position_embeddings=CLIP.context,
            bos_token_id=28,
            eos_token_id=29,
            pad_token_id=1,
        ),
        vision_config=tower(CLIP.vision, image_size=CLIP.resolution, patch_size=CLIP.patch),
        projection_dim=CLIP.embed_dim,
    )
    model = reference.randomize(CLIPModel(config))
    tensors = saved(model, tmp_path_factory.mktemp("clip"))
    tensors.pop("logit_scale")
    return model, vit_names.clip_params(CLIP, tensors)


def image_error(pair):
    model, params = pair
    x, theirs = pixels(CLIP.resolution, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        expected = model.get_image_features(theirs).pooler_output.numpy()
    ours = jax.jit(lambda p, x: clip.image_features(CLIP, p, x))(params, x)
    return reference.error(ours, expected)


def text_error(pair):
    model, params = pair
    tokens = np.array([[28, 3, 4, 5, 29, 1, 1], [28, 7, 2, 29, 29, 29, 29]], np.int32)
    with torch.no_grad():
        expected = model.get_text_features(torch.from_numpy(tokens)).pooler_output.numpy()
    ours = jax.jit(lambda p, t: clip.text_features(CLIP, p, t))(params, tokens)
    return reference.error(ours, expected)


def test_clip_is_that_of_transformers(clip_pair):
    assert image_error(clip_pair) < TOLERANCE
    assert text_error(clip_pair) < TOLERANCE


@pytest.mark.parametrize("change", ["activation", "epsilon", "scaling"])
def test_another_clip_is_caught(clip_pair, change, monkeypatch):
    if change == "epsilon":
        monkeypatch.setattr(clip, "EPSILON", 1e-3)
    elif change == "activation":
        monkeypatch.setattr(jax.nn, "sigmoid", lambda x: jax.scipy.stats.norm.cdf(x / 1.702))
    else:
        monkeypatch.setattr(clip, "MEAN", (0.5, 0.5, 0.5))
    error = image_error if change == "scaling" else text_error
    assert error(clip_pair) > 10 * TOLERANCE


@pytest.fixture(scope="module")
def dino_pair(tmp_path_factory):
    config = Dinov2Config(
        hidden_size=DINO.width,
        num_hidden_layers=DINO.layers,
        num_attention_heads=DINO.heads,
        image_size=DINO.grid * DINO.patch,
        patch_size=DINO.patch,
    )
    model = reference.randomize(Dinov2Model(config))
    tensors = saved(model, tmp_path_factory.mktemp("dino"))
    tensors.pop("embeddings.mask_token")
    return model, vit_names.dinov2_params(DINO, tensors)


def dino_error(pair, size, config=DINO):
    model, params = pair
    x, theirs = pixels(size, DINO_MEAN, DINO_STD)
    with torch.no_grad():
        expected = model(theirs).pooler_output.numpy()
    ours = jax.jit(lambda p, x: dinov2.apply(config, p, x))(params, x)
    return reference.error(ours, expected)


@pytest.mark.parametrize("patches", [7, 4])  # the position embedding as it is, and resized
def test_dinov2_is_that_of_transformers(dino_pair, patches):
    assert dino_error(dino_pair, patches * DINO.patch) < TOLERANCE


def test_another_dinov2_is_caught(dino_pair, monkeypatch):
    offset = dataclasses.replace(DINO, position_offset=0.1)
    assert dino_error(dino_pair, 20, offset) > 10 * TOLERANCE
    model, params = dino_pair
    blocks = params["blocks"]
    ones = {f"scale{i}": np.ones_like(blocks[f"scale{i}"]) for i in (1, 2)}
    assert dino_error((model, params | {"blocks": blocks | ones}), 20) > 10 * TOLERANCE
    monkeypatch.setattr(dinov2, "EPSILON", 1e-3)
    assert dino_error(dino_pair, 20) > 10 * TOLERANCE


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_position_embeddings_are_resized_as_pytorch_does(offset):
    """As DINOv2's own code asks for it: by a factor where an offset is added, else to a size."""
    maps = np.random.default_rng(0).standard_normal((1, 3, 37, 37), np.float32)
    scale = {"scale_factor": ((16 + offset) / 37,) * 2} if offset else {"size": (16, 16)}
    theirs = torch.nn.functional.interpolate(torch.from_numpy(maps), mode="bicubic", **scale)
    matrix = dinov2._cubic_matrix(37, 16, offset)
    ours = np.einsum("yh,bchw,xw->bcyx", matrix, maps, matrix)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=3e-5)
