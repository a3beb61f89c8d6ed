"""The flags of each verb of `ldm`."""

import argparse
from pathlib import Path


def make_parser(
    texts: dict[str, str],
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `ldm VERB ...` and that of each verb; `texts` says in a line what each does."""
    parser = argparse.ArgumentParser(
        prog="ldm",
        description="Latent diffusion models in JAX, from raw images to samples and metrics.",
    )
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs = {
        name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()
    }
    for name, verb in verbs.items():
        if name != "weights":
            _add_common(verb, workdir_default="runs/demo" if name == "demo" else None)
    for name in ("train-autoencoder", "train-denoiser"):
        verbs[name].add_argument(
            "--config",
            metavar="FILE[:VARIANT]",
            help="not needed to resume a workdir; fields are changed with --config.a.b=VALUE",
        )
    verbs["experiment"].add_argument("--config", metavar="FILE[:VARIANT]", required=True)
    cache = verbs["cache-latents"]
    cache.add_argument("--out", type=Path, help="folder of the cache (default: WORKDIR/latents)")
    cache.add_argument(
        "--mirrored",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirrored images too",
    )
    cache.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    cache.add_argument("--batch-size", type=int, default=0, help="images per step of one process")
    cache.add_argument("--shard-examples", type=int, default=16384, help="examples per shard file")
    cache.add_argument("--pack", type=int, default=32, help="examples per record")
    cache.add_argument("--splits", default="train,held_out", help="which splits to encode")
    for name in ("sample", "evaluate"):
        _add_sampling(verbs[name])
    verbs["sample"].add_argument("--num", type=int, default=16, help="images to draw")
    verbs["evaluate"].add_argument(
        "--num", type=int, default=0, help="samples (1000) or held-out images (10000) to measure"
    )
    verbs["sample"].add_argument("--out", type=Path, help="writes OUT.npz and OUT.png")
    _add_averaging(verbs["ema"])
    _add_weights(verbs["weights"])
    verbs["import"].add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR_OR_FILE",
        help="folder of diffusers' AutoencoderKL or VQModel; .ckpt or .safetensors by CompVis",
    )
    verbs["import"].add_argument(
        "--config",
        default="",
        metavar="FILE:VARIANT",
        help="images and, for a file, architecture; fields are changed with --config.a.b=VALUE",
    )
    verbs["export"].add_argument("--out", type=Path, required=True, help="new folder to write")
    _add_reconstructing(verbs["reconstruct"])
    return parser, verbs


def _add_common(verb: argparse.ArgumentParser, workdir_default: str | None) -> None:
    verb.add_argument(
        "--workdir",
        type=Path,
        required=workdir_default is None,
        default=workdir_default,
        help="run directory" + (f" (default: {workdir_default})" if workdir_default else ""),
    )
    group = verb.add_argument_group("processes")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num-processes", type=int)
    group.add_argument("--process-id", type=int)
    group.add_argument(
        "--distributed", action="store_true", help="join as the cluster says (TPU pods, SLURM, GKE)"
    )


def _add_averaging(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--width", type=float, required=True, help="sigma_rel, a share of the training, as 0.12"
    )
    verb.add_argument("--step", type=int, default=-1, help="as of it (default: the last snapshot)")
    verb.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new run directory (default: WORKDIR/ema/width-WIDTH-stepSTEP)",
    )


def _add_weights(verb: argparse.ArgumentParser) -> None:
    vits = ["clip-vit-b32", "clip-vit-l14-336", "dinov2-vitl14"]
    verb.add_argument("name", choices=["lpips", "inception", "vgg16", *vits])
    verb.add_argument(
        "--from",
        dest="files",
        default="",
        metavar="FILE[,FILE]",
        help=".safetensors, .npz or .pth files of the weights (default: fetch the published ones)",
    )
    verb.add_argument("--out", type=Path, help="file to write (default: in the user's cache)")
    verb.add_argument(
        "--unverified", action="store_true", help="take other weights of the same shapes too"
    )


def _add_reconstructing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--images", required=True, metavar="DIR", help="folder of images")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    verb.add_argument(
        "--size", type=int, default=0, help="pixels a side (default: the model's resolution)"
    )
    verb.add_argument("--batch-size", type=int, default=0, help="images at a time over all devices")


def _add_sampling(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--steps", type=int, default=50, help="denoising steps")
    verb.add_argument("--sampler", default="ddim", help="ddim, ddpm, dpmpp_2m, heun, ...")
    verb.add_argument(
        "--eta", type=float, default=-1.0, help="sampler's noise, 0..1 (default: its own)"
    )
    verb.add_argument(
        "--spacing",
        default="auto",
        metavar="NAME[:NUMBER]",
        help="of the steps: leading, trailing, karras:7, ... (default: the process' own)",
    )
    verb.add_argument(
        "--temperature", type=float, default=1.0, help="multiplies the noise of the steps"
    )
    verb.add_argument(
        "--guidance", type=float, default=1.0, help="1 = conditional model only, >1 extrapolates"
    )
    verb.add_argument(
        "--classes", default="", metavar="I,J,...", help="classes in turn (default: all)"
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--noise", default="", metavar="FILE.npy", help="initial noise f32 [N,H,W,C]")
    verb.add_argument("--batch-size", type=int, default=0, help="images at a time over all devices")
    verb.add_argument(
        "--weights",
        default="auto",
        help="auto, params, ema, or ema-NAME of another average, as ema-0.999 or ema-power-0.05",
    )
    verb.add_argument("--step", type=int, default=-1, help="checkpoint (default: the newest)")
