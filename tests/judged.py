"""Networks that compile at once in the places of those that judge, and digits to be judged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.data.images import open_images
from ldm_jax.eval import judge
from ldm_jax.eval.extractors import EXTRACTORS
from ldm_jax.eval.image_sets import ImageStream
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.jobs import evaluate
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, make_mesh
from tests import tiny

TAPS = {
    "random-conv": {"quarters": 6},
    "inception": {"2048": 6, "spatial2023": 5, "logits_unbiased": 7},
    "vgg16": {"fc2_relu": 4},
}
RANDOM = JudgeOptions(preset="custom", extractor="random-conv")
ADM = JudgeOptions()


def kernel(name):
    width = sum(TAPS[name].values())
    rng = np.random.default_rng(len(name))
    return rng.normal(0, 192**-0.5, (192, width)).astype(np.float32)


def split(name, f):
    ends = np.cumsum(list(TAPS[name].values()))[:-1]
    return dict(zip(TAPS[name], np.split(f, ends, -1), strict=True))


def features(name, pictures):
    """{tap: f32 [N,D]} of uint8 [N,8,8,3], in plain numpy."""
    x = pictures.reshape(len(pictures), -1).astype(np.float32) / 127.5 - 1
    return split(name, np.maximum(x @ kernel(name), 0))


def extractor(name, traces):
    def network(params, x):
        traces.append(name)
        f = jax.nn.relu((x.reshape(len(x), -1) / 127.5 - 1.0) @ params["kernel"])
        ends = np.cumsum(list(TAPS[name].values()))[:-1]
        return dict(zip(TAPS[name], jnp.split(f, ends, -1), strict=True))

    def init():
        return {"kernel": kernel(name)}

    real = EXTRACTORS[name]
    return dataclasses.replace(real, taps=TAPS[name], side=8, network=network, init=init)


@pytest.fixture(scope="module")
def judges():
    """Small networks as random-conv and, with weights that pass as published, Inception and VGG16.

    The names of those that are traced, in order.
    """
    traces, read = [], judge.read_weights

    def read_as_published(name, file):
        return read(name, file)._replace(published=name != "random-conv")

    with pytest.MonkeyPatch.context() as patch:
        for name in TAPS:
            patch.setitem(EXTRACTORS, name, extractor(name, traces))
        patch.setattr(judge, "read_weights", read_as_published)
        yield traces


def digits(count, split="train"):
    """uint8 [count,8,8,3], the first ones of a split."""
    rows = np.arange(count)
    source = open_images(tiny.AUTOENCODER.images, split, augment=False)
    return source.read(rows, rows)["image"]


def images_of(pictures, name="pictures"):
    digest = str(hash(pictures.tobytes()))
    return ImageStream(len(pictures), lambda rows: pictures.__getitem__, name, digest)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def plain(figures):
    """Without the protocols in their names."""
    return {name.split("-")[0]: value for name, value in figures.items()}


def evaluate_trained(out, step):
    """{stage: figures} of both of `tests/train/worker.py`'s trainings, by `ldm evaluate`."""
    samples = SampleOptions(num=21, step=step, steps=2, guidance=2.0, batch_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXTRACTORS, "random-conv", extractor("random-conv", []))
        patch.setattr(evaluate, "reconstruction_figures", lambda *a, **k: {})
        return {
            "autoencoder": evaluate.first_stage(out / "autoencoder", RANDOM, num=21, step=step),
            "denoiser": evaluate.denoiser(out / "denoiser", samples, RANDOM, labels="random"),
        }
