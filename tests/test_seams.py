"""The seams hold what is not there yet: each is proven by a toy that goes in without any job."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.data.images import SOURCES, ImagesConfig
from ldm_jax.errors import InputError
from ldm_jax.jobs import cache_latents, train_autoencoder, train_denoiser
from ldm_jax.keys import key_for
from ldm_jax.models import conditions, denoiser
from ldm_jax.models.autoencoder import AutoencoderConfig
from ldm_jax.models.conditions import CONDITIONS, Signals, Widths
from ldm_jax.models.denoiser import BACKBONES, Backbone, DenoiserConfig
from ldm_jax.models.layers import Dense, declarations, draw_parameters, parameter_axes
from ldm_jax.runs import training
from ldm_jax.runs.build import build, facts_of_config
from ldm_jax.runs.config_files import build as build_config
from ldm_jax.runs.config_files import to_json
from ldm_jax.runs.denoiser import load_model
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling.draw import draw_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, constrain, make_mesh
from ldm_jax.train import ema, optim
from ldm_jax.train.adversarial import AdversarialConfig
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.first_stage import AutoencoderLoss
from ldm_jax.train.hooks import Hook
from ldm_jax.train.step import Seen, Training, make_trainer
from tests import tiny
from tests.data import toy

SHARDED = MeshConfig(2, 4, 1)


def bits(tree):
    return jax.tree.map(np.asarray, tree)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, bits(a), bits(b))


# A program lowered from a config alone is the one that training runs.


def trained_program(job, config, workdir, monkeypatch):
    """The text of the step's program as a job would run it, on its own arrays; nothing is run."""
    found = []

    def lower(loop_config, trainer, frozen, batches, **more):
        state, host = trainer.init(), next(batches(0))
        batch = {n: host[n] for n in trainer.batch_spec}
        batch = jax.device_put(batch, jax.tree.map(lambda s: s.sharding, trainer.batch_spec))
        found.append(trainer.step.lower(state, frozen, batch).as_text())

    monkeypatch.setattr(training.loop, "train", lower)
    job.run(config, workdir)
    return found[0]


def program_of_config(config, facts):
    """The same from specs; no array is made on the way."""
    mesh, before = make_mesh(config.mesh), len(jax.live_arrays())
    trainer = build(config, facts, mesh)
    lowered = trainer.step.lower(
        trainer.abstract_state, trainer.abstract_frozen, trainer.batch_spec
    )
    assert len(jax.live_arrays()) == before
    return lowered.as_text()


def test_a_denoisers_program_is_lowered_from_its_config_alone(first_stage, tmp_path, monkeypatch):
    config = dataclasses.replace(
        tiny.DENOISER, autoencoder=str(first_stage), whitening="none", mesh=SHARDED
    )
    facts = facts_of_config(config, tiny.AUTOENCODER.model)
    planned = program_of_config(config, facts)
    assert planned == trained_program(train_denoiser, config, tmp_path, monkeypatch)


def test_a_first_stages_program_is_lowered_from_its_config_alone(tmp_path, monkeypatch):
    config = dataclasses.replace(tiny.AUTOENCODER, mesh=SHARDED)
    planned = program_of_config(config, None)
    assert planned == trained_program(train_autoencoder, config, tmp_path, monkeypatch)


# A backbone whose blocks are scanned and rematerialised.


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    in_channels: int = 2
    out_channels: int = 2
    width: int = 16
    layers: int = 3
    factor: int = 1


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        h = Dense(2 * self.width, ("in_channels", "hidden"), name="up")(x)
        x = x + Dense(self.width, ("hidden", "in_channels"), name="down")(nn.swish(h))
        return constrain(x, "batch", "tokens", "channels"), None


class Toy(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, z_t, t, signals):
        c = self.config
        b, h, w, _ = z_t.shape
        x = Dense(c.width, name="conv_in")(z_t.reshape(b, h * w, -1))
        x = x + Dense(c.width, name="time_in")(t[:, None].astype(jnp.float32) / 1000)[:, None]
        if signals.tokens is not None:
            x = x + Dense(c.width, name="tokens")(signals.tokens).mean(1, keepdims=True)
        if signals.maps is not None:
            x = x + Dense(c.width, name="maps")(signals.maps.reshape(b, h * w, -1))
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.layers,
        )
        x, _ = blocks(c.width, name="blocks")(x, None)
        x = Dense(c.out_channels, name="conv_out")(x)
        return x.reshape(b, h, w, -1).astype(jnp.float32)


def toy_declared(config, widths):
    signals = Signals(
        None,
        jnp.zeros((1, 1, widths.tokens)) if widths.tokens else None,
        jnp.zeros((1, 2, 2, widths.maps)) if widths.maps else None,
    )
    z = jnp.zeros((1, 2, 2, config.in_channels))
    return declarations(Toy(config), z, jnp.zeros((1,)), signals)


TOY = Backbone(
    ToyConfig,
    lambda config, key, widths: draw_parameters(toy_declared(config, widths), key),
    lambda config, widths: parameter_axes(toy_declared(config, widths)),
    lambda config, params, *inputs: Toy(config).apply({"params": params}, *inputs),
    ("conv_in", "conv_out", "time_in"),
)


@pytest.fixture
def toy_backbone(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", TOY)


def with_toy(first_stage, **changes):
    model = dataclasses.replace(tiny.DENOISER.model, backbone=ToyConfig())
    config = dataclasses.replace(
        tiny.DENOISER,
        model=model,
        autoencoder=str(first_stage),
        mesh=SHARDED,
        num_steps=4,
        checkpoint_every=2,
        ema=ema.EmaConfig(decay=0.9),
    )
    return dataclasses.replace(config, **changes)


def test_a_scanned_backbone_trains_sharded_and_resumes(toy_backbone, first_stage, tmp_path):
    config = with_toy(first_stage)
    assert build_config(DenoiserRun, to_json(config)) == config  # run.json names the row
    unbroken = train_denoiser.run(config, tmp_path / "unbroken")
    train_denoiser.run(dataclasses.replace(config, num_steps=2), tmp_path / "broken")
    resumed = train_denoiser.run(config, tmp_path / "broken")
    assert_same_bits(unbroken, resumed)
    up = unbroken.params["backbone"]["blocks"]["up"]["kernel"]
    assert up.shape == (3, 16, 32)
    assert up.sharding.spec == jax.sharding.PartitionSpec(None, ("fsdp",), None)
    moment = optax.tree.get_all_with_path(unbroken.opt_state, "mu")[0][1]
    assert moment["backbone"]["blocks"]["up"]["kernel"].sharding == up.sharding


def test_layers_of_a_scan_are_drawn_each_for_itself_by_its_own_law():
    declared = toy_declared(ToyConfig(width=64), DenoiserConfig().widths)
    kernel = draw_parameters(declared, jax.random.key(0))["blocks"]["up"]["kernel"]
    assert kernel.shape == (3, 64, 128)
    assert len({float(layer.sum()) for layer in kernel}) == 3
    # Uniform in +-1/sqrt(fan in), of one layer: the stack is no fan.
    np.testing.assert_allclose(np.abs(kernel).max((1, 2)), 1 / 8, rtol=1e-3)
    np.testing.assert_allclose(kernel.std((1, 2)), 1 / 8 / 3**0.5, rtol=0.02)
    names = parameter_axes(declared)["blocks"]
    assert names["up"]["kernel"] == (None, "in_channels", "hidden")
    assert names["down"]["bias"] == (None, "in_channels")


# A frozen network in the loss.

FROZEN = {"guide": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}


def regression(accumulate=1):
    """x W, and what a frozen linear map makes of it, against targets."""

    def loss(trained, extra, frozen, batch, step):
        y = batch["x"] @ trained["w"]["kernel"]
        seen = y @ constrain(frozen["guide"]["kernel"], None, None)
        value = jnp.square(seen - batch["y"]).mean()
        return value, Seen({"size": jnp.abs(seen).mean()}, {})

    config = optim.OptimConfig(lr=0.1)
    return Training(
        init=lambda key: {"w": {"kernel": jax.random.normal(key, (8, 8))}},
        axes={"w": {"kernel": ("in_channels", "out_channels")}},
        loss=loss,
        optimizer=optim.make_optimizer(config, 10),
        learning_rate=optim.learning_rate(config, 10),
        average=ema.EmaConfig(decay=0.9),
        batch={
            "x": jax.ShapeDtypeStruct((16, 8), jnp.float32),
            "y": jax.ShapeDtypeStruct((16, 4), jnp.float32),
        },
        accumulate=accumulate,
        frozen=FROZEN,
        frozen_axes={"guide": {"kernel": ("in_channels", "out_channels")}},
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_frozen_network_is_sharded_kept_and_never_saved(tmp_path, accumulate):
    trainer = make_trainer(regression(accumulate), make_mesh(SHARDED))
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 4)).astype(np.float32)
    place = trainer.abstract_frozen["guide"]["kernel"].sharding
    assert not place.is_fully_replicated
    frozen = {"guide": {"kernel": jax.device_put(kernel, place)}}
    batch = {"x": rng.normal(size=(16, 8)), "y": rng.normal(size=(16, 4))}
    batch = jax.device_put(
        {n: x.astype(np.float32) for n, x in batch.items()},
        jax.tree.map(lambda s: s.sharding, trainer.batch_spec),
    )
    state, losses = trainer.init(), []
    for _ in range(5):
        state, metrics = trainer.step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_array_equal(frozen["guide"]["kernel"], kernel)  # neither moved nor donated
    other = {"guide": {"kernel": jax.device_put(2 * kernel, place)}}
    assert float(trainer.step(state, other, batch)[1]["loss"]) != losses[-1]  # and it is read
    checkpoints = Checkpoints(tmp_path)
    saved = trainer.init()
    checkpoints.save(saved, {})
    checkpoints.wait()
    assert checkpoints.items(0) >= {"params", "optimizer", "ema", "meta"}
    assert not any("guide" in str(p) for p in tmp_path.rglob("*"))
    checkpoints.close()


# Conditions with fields of their own: a map that is always kept, and tokens that may be dropped.


@dataclasses.dataclass(frozen=True)
class MapCondition:
    """A map [8,8] beside z_t, as one channel."""

    widths = Widths(maps=1)
    fields = ("semantic",)

    def entries(self):
        return {"semantic": jax.ShapeDtypeStruct((8, 8), jnp.int32)}

    def init(self, key):
        return {"map_gain": jnp.ones(())}

    def axes(self):
        return {"map_gain": ()}

    def apply(self, params, cond):
        values = (cond["semantic"] - 1128).astype(jnp.float32) / 128
        return Signals(maps=(params["map_gain"] * values)[..., None])

    def null(self, batch_size):
        return {}

    def read(self, rows):
        return {"semantic": rows["semantic"]}


@dataclasses.dataclass(frozen=True)
class TokenCondition:
    """Five words of a small vocabulary; word 0 says nothing."""

    vocabulary: int = 16
    width: int = 8

    @property
    def widths(self):
        return Widths(tokens=self.width)

    fields = ("tokens",)

    def entries(self):
        return {"words": jax.ShapeDtypeStruct((5,), jnp.int32)}

    def init(self, key):
        return {"words": jax.random.normal(key, (self.vocabulary, self.width))}

    def axes(self):
        return {"words": ("vocab", "in_channels")}

    def apply(self, params, cond):
        return Signals(tokens=params["words"][cond["words"]])

    def null(self, batch_size):
        return {"words": jnp.zeros((batch_size, 5), jnp.int32)}

    def read(self, rows):
        return {"words": 1 + np.asarray(rows["tokens"], np.int32) % (self.vocabulary - 1)}


@pytest.fixture
def toy_conditions(toy_backbone, monkeypatch, tmp_path):
    """A run on cached pixels of the toy source, told by its maps and its tokens."""
    monkeypatch.setitem(SOURCES, "toy", lambda config, split: toy.source())
    monkeypatch.setitem(CONDITIONS, "map", MapCondition)
    monkeypatch.setitem(CONDITIONS, "words", TokenCondition)
    pixels = dataclasses.replace(
        tiny.AUTOENCODER,
        images=ImagesConfig(source="toy", resolution=toy.RESOLUTION),
        model=AutoencoderConfig(
            latent="identity", resolution=8, width_multipliers=(1,), latent_channels=3
        ),
        loss=AutoencoderLoss(perceptual_weight=0.0),
        adversarial=AdversarialConfig(),
    )
    train_autoencoder.run(pixels, tmp_path / "pixels")
    cache_latents.run(tmp_path / "pixels", cache_latents.CacheOptions(pack=8, splits=("train",)))
    told = {"semantic": MapCondition(), "words": TokenCondition()}
    model = DenoiserConfig(ToyConfig(in_channels=3, out_channels=3), told)
    loss = dataclasses.replace(tiny.DENOISER.loss, condition_dropout=0.5)
    return with_toy(tmp_path / "pixels", model=model, loss=loss, flip=True, whitening="channel")


def toy_fields(count):
    examples = [toy.example(i, wide=8) for i in range(count)]
    return {name: np.stack([e[name] for e in examples]) for name in ("semantic", "tokens")}


def test_conditions_with_their_own_fields_train_drop_guide_and_sample(toy_conditions, tmp_path):
    config, kinds = toy_conditions, {"semantic": "map", "words": "words"}
    plain = to_json(config)["model"]["conditions"]
    assert {name: row["kind"] for name, row in plain.items()} == kinds
    assert build_config(DenoiserRun, to_json(config)) == config
    state = train_denoiser.run(config, tmp_path / "run")
    before = denoiser.init(config.model, key_for(config.seed, "init"))
    for name in ("words", "map_gain"):  # both are learned from
        have, start = state.params["conditioner"][name], before["conditioner"][name]
        assert float(jnp.abs(have - start).max()) > 0
    # The null word is trained where tokens were dropped, and maps never are.
    rows = {n: jnp.asarray(x) for n, x in toy_fields(8).items()}
    cond = conditions.read(config.model.conditions, rows)
    dropped = conditions.drop(config.model.conditions, cond, jnp.arange(8) % 2 == 0)
    np.testing.assert_array_equal(dropped["semantic"], cond["semantic"])
    np.testing.assert_array_equal(dropped["words"][::2], 0)
    np.testing.assert_array_equal(dropped["words"][1::2], cond["words"][1::2])

    model = load_model(tmp_path / "run")
    options = SampleOptions(num=8, batch_size=8, steps=2, guidance=2.0)
    with pytest.raises(InputError, match="'semantic' reads the field 'semantic'"):
        draw_images(model, options)
    fields = toy_fields(8)
    images, _ = draw_images(model, options, fields)
    assert images.shape == (8, 8, 8, 3)
    for name in fields:
        other = fields | {name: fields[name][::-1]}
        assert (draw_images(model, options, other)[0] != images).any(), name
    unguided = dataclasses.replace(options, guidance=1.0)
    assert (draw_images(model, unguided, fields)[0] != images).any()
    # Sample i takes row i of the fields in turn.
    half = {name: values[:4] for name, values in fields.items()}
    np.testing.assert_array_equal(draw_images(model, options, half)[0][:4], images[:4])


def test_a_cache_without_a_conditions_field_is_refused(toy_backbone, first_stage, tmp_path):
    model = dataclasses.replace(
        tiny.DENOISER.model, backbone=ToyConfig(), conditions={"words": TokenCondition()}
    )
    with pytest.raises(InputError, match=r"conditions.words reads 'tokens' .* holds \['label'\]"):
        train_denoiser.run(with_toy(first_stage, model=model), tmp_path)


# A hook that raises.


def test_a_hook_that_raises_loses_nothing(toy_backbone, first_stage, tmp_path, monkeypatch):
    config = with_toy(first_stage, checkpoint_every=4)
    unbroken = train_denoiser.run(config, tmp_path / "unbroken")
    real, calls = training.fit, []

    def broken(state, step):
        calls.append(step)
        if step == 3:
            raise RuntimeError("the judge fell over")

    def fit(*arguments, hooks=(), **more):
        return real(*arguments, hooks=[*hooks, Hook(1, broken)], **more)

    monkeypatch.setattr(train_denoiser, "fit", fit)
    with pytest.raises(RuntimeError, match="fell over"):
        train_denoiser.run(config, tmp_path / "broken")
    assert calls == [1, 2, 3]
    monkeypatch.undo()
    monkeypatch.setitem(BACKBONES, "toy", TOY)
    resumed = train_denoiser.run(config, tmp_path / "broken")
    assert_same_bits(unbroken, resumed)
    lines = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("broken", "unbroken")]
    steps = [[line.split(",")[0] for line in text.splitlines()] for text in lines]
    assert steps[0] == steps[1] == [f'{{"step": {n}' for n in (1, 2, 3, 4)]
