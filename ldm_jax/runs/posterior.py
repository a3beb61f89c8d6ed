"""What a first stage's posterior noise is worth: its size, and what it costs the decoder.

Denoisers of draws and of means are trained on latents that differ by that noise alone.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ldm_jax.data.images import open_images
from ldm_jax.errors import InputError
from ldm_jax.eval import frechet
from ldm_jax.eval.first_stage import Lpips, per_image, summary
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.images_out import grid
from ldm_jax.eval.judge import Judge, JudgeOptions, find_preset, open_judge
from ldm_jax.eval.report import Curve, Table, write_report
from ldm_jax.eval.spectrum import CUT, Spectrum, high_frequency_power
from ldm_jax.eval.statistics import merge_hosts, process_rows
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import autoencoder, latents
from ldm_jax.runs.first_stage import FirstStage
from ldm_jax.runs.reconstruction import SHOWN, spread
from ldm_jax.sharding import batch_sharding, fitting_batch, over_batches, use_mesh

REPORT = "posterior.html"
NUM = 1000  # held-out images that are measured by default
BATCH = 100  # at a time, over all devices
SCALES = (0, 1, 2, 4, 8)  # k of D(mu + k sigma xi)
PICTURED = (0, 1, 8)
ORIGINALS = "originals"
RANDOM_CONV = JudgeOptions(preset="custom", extractor="random-conv")
FRECHET, HIGH, DISTANCE = "frechet_random_conv", "high_frequency_ratio", "spectrum_distance"

Decode = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Of `num` images and their places in the latent, [C]; decoded by k of `SCALES`."""

    mean_std: np.ndarray  # f64 [C], the deviation of the mean mu
    noise: np.ndarray  # f64 [C], sqrt(E[sigma^2])
    decoded: dict[int, dict[str, float]]  # figures of D(mu + k sigma xi), as `measure` says
    spectra: dict[str, Spectrum]  # of the originals, and by `name_of`
    picture: np.ndarray  # uint8 [H,W,3], originals over what was decoded for k of `PICTURED`
    num: int
    step: int  # of the first stage

    @property
    def ratios(self) -> np.ndarray:
        """sqrt(E[sigma^2]) / std(mu), f64 [C]; infinite for a mean that never changes."""
        with np.errstate(divide="ignore"):
            return self.noise / self.mean_std

    @property
    def figures(self) -> dict[str, float]:
        """All of them by name, for a line of results."""
        rows = {f"noise_ratio/{c}": float(r) for c, r in enumerate(self.ratios)}
        rows["noise_ratio_max"] = float(self.ratios.max())
        for k, figures in self.decoded.items():
            rows |= {f"{name}/k{k}": value for name, value in figures.items()}
        return rows | {"num_images": float(self.num), "step": float(self.step)}

    @property
    def verdict(self) -> str:
        """What it means for denoisers of draws and of means, in a sentence."""
        mean, drawn, worst = self.decoded[0], self.decoded[1], int(self.ratios.argmax())
        return (
            f"The posterior's noise is at most {self.ratios[worst]:.3g} of the latent's deviation "
            f"(channel {worst}): codecs `sample` and `mean` can differ only where the diffusion's "
            "noise-to-signal ratio is below that; drawing costs the decoder "
            f"{mean['psnr_db'] - drawn['psnr_db']:.3g} dB of PSNR and brings the power above "
            f"{CUT} cycles/pixel from {100 * mean[HIGH]:.4g} % to {100 * drawn[HIGH]:.4g} % of "
            "the originals'."
        )

    @property
    def tables(self) -> list[Table]:
        channels = zip(self.mean_std, self.noise, self.ratios, strict=True)
        return [
            Table(
                "Latent channels",
                ("channel", "std(mu)", "sqrt(E[sigma^2])", "ratio"),
                [(str(c), *(f"{v:.4g}" for v in row)) for c, row in enumerate(channels)],
            ),
            Table(
                "Decoded",
                ("", *self.decoded[0]),
                [
                    (name_of(k), *(f"{v:.4g}" for v in row.values()))
                    for k, row in self.decoded.items()
                ],
            ),
        ]


def name_of(k: int) -> str:
    """How what is decoded is called."""
    return "D(mu)" if k == 0 else f"D(mu + {f'{k} ' if k > 1 else ''}sigma xi)"


def measure_posterior(
    first_stage: FirstStage,
    mesh: Mesh,
    *,
    limit: int = NUM,
    seed: int = 0,
    lpips: Lpips | None = None,
    allow_few: bool = False,
    batch_size: int = BATCH,
) -> Posterior:
    """Of at most `limit` images spread over the held-out split, `batch_size` at a time.

    xi of an image is drawn from `seed` and its index, the same for every k. The figures of each k
    are those of `eval.first_stage.measure`, its Fréchet distance from the originals in features of
    random-conv, unless the images are too few and not `allow_few`, its power above 0.25
    cycles/pixel over the originals' (nan for flat ones), and `Spectrum.distance`. Every process
    must call it. Raises InputError for a first stage whose latents have no spread.
    """
    config = first_stage.config
    if config.posterior != "gaussian":
        raise InputError(
            f"a first stage of latent {config.latent!r} has no posterior to draw from: its latents "
            "are points; measure one of latent 'kl', or leave --posterior out"
        )
    source = open_images(first_stage.run.images, "held_out", augment=False)
    chosen = spread(len(source), limit)
    pictured = chosen[spread(len(chosen), SHOWN)]
    judge = _open_judge(mesh, len(chosen), allow_few)
    size = fitting_batch(min(batch_size, len(chosen)), mesh)
    decode = compile_decodes(first_stage, mesh, seed, size)
    names = (ORIGINALS, *map(name_of, SCALES))
    images: dict[str, list[np.ndarray]] = {name: [] for name in names}
    rows: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    moments: dict[str, Moments] = {}
    spectra: dict[str, Spectrum] = {}
    total, squares, variance = 0.0, 0.0, 0.0
    for start in range(0, len(chosen), size):
        indices = chosen[start : start + size]
        pictures = source.read(indices, indices)["image"]
        out = decode(pictures, indices)
        mean = out["mean"].astype(np.float64)
        total += mean.mean((1, 2)).sum(0)
        squares += np.square(mean).mean((1, 2)).sum(0)
        variance += np.square(out["std"], dtype=np.float64).mean((1, 2)).sum(0)
        for name, part in zip(names, (pictures, *np.moveaxis(out["decoded"], 1, 0)), strict=True):
            images[name].append(part[np.isin(indices, pictured)])
            spectrum = Spectrum.of(part)
            spectra[name] = spectra[name].merge(spectrum) if start else spectrum
            if judge:
                features = _moments(judge, part)
                moments[name] = moments[name].merge(features) if start else features
            if name != ORIGINALS:
                rows[name].append(per_image(pictures, part, lpips))
    num = len(chosen)
    moments = {name: merge_hosts(m) for name, m in moments.items()}
    power = high_frequency_power(spectra[ORIGINALS])

    def figures(name: str) -> dict[str, float]:
        row = summary(rows[name])
        del row["num_images"]
        if judge:
            row[FRECHET] = frechet.distance(moments[ORIGINALS], moments[name])
        row[HIGH] = high_frequency_power(spectra[name]) / power if power else float("nan")
        return row | {DISTANCE: spectra[name].distance(spectra[ORIGINALS])}

    shown = [image for name in (ORIGINALS, *map(name_of, PICTURED)) for image in images[name]]
    return Posterior(
        mean_std=np.sqrt(np.maximum(squares / num - np.square(total / num), 0.0)),
        noise=np.sqrt(variance / num),
        decoded={k: figures(name_of(k)) for k in SCALES},
        spectra=spectra,
        picture=grid(np.concatenate(shown), len(pictured)),
        num=num,
        step=first_stage.step,
    )


def compile_decodes(first_stage: FirstStage, mesh: Mesh, seed: int, size: int) -> Decode:
    """(images uint8 [N,H,W,3], their indices [N]) -> host arrays of `size` images at a time.

    {"mean", "std"}: the posterior, f32 [N,h,w,C]; "decoded": D(mu + k sigma xi) for k of `SCALES`,
    uint8 [N,K,H,W,3], rounded and clipped.
    """
    config = first_stage.config

    def forward(params: Any, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        with use_mesh(mesh):
            moments = autoencoder.encode(config, params, autoencoder.to_unit(rows["image"]))
            mean, logvar = latents.split_moments(moments)
            std = jnp.exp(0.5 * logvar)
            xi = normal_like(example_keys(key_for(seed, "posterior"), rows["index"]), mean)

            def decoded(k):
                z = mean + k * std * xi
                return autoencoder.to_uint8(autoencoder.decode(config, params, z))

            # One decoder in the program, and in memory, for all k.
            images = jax.lax.map(decoded, jnp.asarray(SCALES, jnp.float32))
            return {"mean": mean, "std": std, "decoded": jnp.moveaxis(images, 0, 1)}

    compiled = jax.jit(forward, out_shardings=batch_sharding(mesh))
    on_batch = functools.partial(compiled, first_stage.params)

    def decode(pictures, indices):
        rows = {"image": pictures, "index": np.asarray(indices, np.int32)}
        return over_batches(on_batch, rows, mesh, size)

    return decode


def write_posterior(posterior: Posterior, workdir: Path, command: str) -> Path:
    """WORKDIR/posterior.html, with curves over k; returns its path."""

    def over_k(name: str) -> dict[str, tuple[list[int], list[float]]]:
        return {name: (list(posterior.decoded), [row[name] for row in posterior.decoded.values()])}

    labels = {"psnr_db": "PSNR", FRECHET: "Fréchet distance", HIGH: "Power of high frequencies"}
    units = {"psnr_db": "dB", HIGH: "of the originals'"}
    curves = [
        Curve(f"{label} of D(mu + k sigma xi)", over_k(name), False, "k", units.get(name, ""))
        for name, label in labels.items()
        if name in posterior.decoded[0]
    ]
    spectra = {name: (s.frequency, s.power) for name, s in posterior.spectra.items()}
    label = "mean power of a mode, squared grey values"
    curves.append(Curve("Radial power spectrum", spectra, True, "cycles/pixel", label))
    lines = ", ".join((ORIGINALS, *map(name_of, PICTURED)))
    path = Path(workdir) / REPORT
    write_report(
        path,
        title="The posterior's noise",
        summary=f"{posterior.num} held-out images. {posterior.verdict}",
        tables=posterior.tables,
        images=[(f"From above: {lines}", posterior.picture)],
        curves=curves,
        commands=[command],
    )
    return path


def _open_judge(mesh: Mesh, num: int, allow_few: bool) -> Judge | None:
    """random-conv; None, and it says so, where its covariances would be singular."""
    tap = find_preset(RANDOM_CONV).tap
    judge = open_judge(RANDOM_CONV, mesh, {tap: None})
    if num > judge.taps[tap] or allow_few:
        return judge
    print(
        f"{FRECHET} is left out: {num} images for {judge.taps[tap]} features; --allow-few "
        "measures it all the same",
        file=sys.stderr,
    )
    return None


def _moments(judge: Judge, pictures: np.ndarray) -> Moments:
    """Of this process's part of `pictures`, uint8 [N,H,W,3], which every process has whole."""
    part, most = process_rows(len(pictures)), process_rows(len(pictures), 0)
    features = judge.measure_many(pictures[part.start : part.stop], len(most))
    return Moments.of(next(iter(features.values())))
