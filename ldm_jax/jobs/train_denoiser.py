"""`ldm train-denoiser`: cached latents to a denoiser."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ldm_jax.data.records import parts
from ldm_jax.data.records.reader import LatentCache, open_cache
from ldm_jax.errors import InputError
from ldm_jax.files import absolute
from ldm_jax.models import conditions
from ldm_jax.models.latents import parts_of
from ldm_jax.runs import held_out
from ldm_jax.runs.build import LatentFacts, build, codec_of, facts_of_manifest, resolve_widths
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.runs.training import fit
from ldm_jax.runs.workdir import check_run
from ldm_jax.sampling import judged
from ldm_jax.sharding import make_mesh, wait_for_all
from ldm_jax.train.hooks import check_keep_best
from ldm_jax.train.state import TrainState


def run(
    config: DenoiserRun, workdir: Path, devices: Sequence[jax.Device] | None = None
) -> TrainState:
    """Trains, or goes on, in `workdir`, on `devices` (None: all); refusals precede any writing."""
    mesh = make_mesh(config.mesh, devices)
    config = resolve_paths(config)
    first_stage = load_first_stage(config.autoencoder, mesh)
    cache = _open(config, "train", first_stage.encoder_hash)
    facts = facts_of_manifest(config, cache.manifest, _parts(config, cache))
    config = resolve_widths(config, facts)
    trainer = build(config, facts, mesh)
    if config.flip and not cache.manifest.mirrored:
        raise InputError(
            f"flip is set, but the latent cache {config.latents} holds no mirrored images; cache "
            "them with `ldm cache-latents --mirrored` or set --config.flip=False"
        )
    hooks = []
    if config.eval_every:
        split = _open(config, "held_out", first_stage.encoder_hash)
        hooks.append(held_out.hook(config, facts, mesh, split))
    if config.samples.num:
        codec = codec_of(config, facts)
        hooks.append(judged.hook(config, workdir, mesh, first_stage, codec))
    check_keep_best(config.keep_best, hooks)
    record = check_run(workdir, "train-denoiser", config, mesh, describe(cache, facts))

    def read(indices: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        rows = cache.read(indices, positions, flip=config.flip, seed=config.seed)
        rows["position"] = positions
        return {"moments": rows["moments"], **conditions.read(config.model.conditions, rows)}

    return fit(
        config,
        workdir,
        trainer,
        read,
        cache.order(config.seed),
        record=record,
        hooks=hooks,
    )


def _open(config: DenoiserRun, split: str, encoder_hash: str) -> LatentCache:
    where = Path(config.latents) / split
    return open_cache(where, expect={"encoder_hash": encoder_hash})


def _parts(config: DenoiserRun, cache: LatentCache) -> parts.Parts:
    """What of the cache the codec needs measured; every process must call it, the first measures.

    Found before, or measured and kept in the cache, which later runs then find.
    """
    if not parts_of(config.codec, cache.manifest.posterior):
        return {}
    if jax.process_index() == 0 and parts.load(cache) is None:
        measured = parts.measure(cache)
        parts.save(cache, measured)
    else:
        measured = None
    wait_for_all("latent-parts")
    # Where nothing can be written, every process comes to the same numbers by itself.
    return measured or parts.load(cache) or parts.measure(cache)


def describe(cache: LatentCache, facts: LatentFacts) -> dict:
    """What run.json says of the data; a resumed run must have the same."""
    manifest = cache.manifest
    white = dataclasses.asdict(facts.whitening)
    return {
        "manifest_hash": manifest.hash(),
        "encoder_hash": manifest.encoder_hash,
        "num_examples": manifest.num_examples,
        "latent_shape": list(manifest.latent_shape),
        "whitening": {name: list(values) for name, values in white.items() if values},
    }


def resolve_paths(config: DenoiserRun) -> DenoiserRun:
    """Absolute places of the first stage and of the latents, so that any folder may resume."""
    if not config.autoencoder:
        raise InputError("config.autoencoder is empty; give the workdir of a trained first stage")
    first_stage = absolute(config.autoencoder)
    cache = absolute(config.latents) or f"{first_stage}/latents"
    return dataclasses.replace(config, autoencoder=first_stage, latents=cache)
