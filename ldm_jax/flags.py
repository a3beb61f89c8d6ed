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
            _add_common(
                verb,
                workdir_default="runs/demo" if name == "demo" else None,
                workdir_needed=name not in ("demo", "evaluate"),
            )
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
    verbs["sample"].add_argument("--num", type=int, default=16, help="images to draw")
    verbs["sample"].add_argument("--out", type=Path, help="writes OUT.npz and OUT.png")
    verbs["sample"].add_argument(
        "--progressive",
        type=int,
        default=0,
        metavar="K",
        help="writes OUT-progress.png: each sample a row, the image predicted every K steps",
    )
    verbs["evaluate"].add_argument(
        "--num",
        type=int,
        default=0,
        help="samples (50000, digits: 1000) or held-out images (10000) to measure",
    )
    _add_judging(verbs["evaluate"])
    for name in ("sample", "evaluate"):
        _add_sampling(verbs[name])
    verbs["sample"].usage = "%(prog)s --workdir=DIR [--FLAG=VALUE ...]"
    verbs["evaluate"].usage = "%(prog)s (--workdir=DIR | --images=SET --out=DIR) [--FLAG=VALUE ...]"
    _add_sizes(verbs["sample"])
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


def _add_common(
    verb: argparse.ArgumentParser, workdir_default: str | None, workdir_needed: bool
) -> None:
    verb.add_argument(
        "--workdir",
        type=Path,
        required=workdir_needed,
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


def _add_judging(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group(
        "frozen networks",
        "Without any of these flags, first stages are measured by PSNR, SSIM and LPIPS, samples of "
        "the digits by a classifier, all others by preset adm against their training images.",
    )
    add = group.add_argument
    preset = "conventions of: adm, torch_fidelity, clean, edm2"
    add("--preset", default="", metavar="NAME", help=preset)
    network = "a network by its own resize: random-conv (needs no file), inception, vgg16, ..."
    add("--extractor", default="", metavar="NAME", help=network)
    file = "its weights, of a preset of two the first one's (default: as `ldm weights` puts them)"
    add("--extractor-file", default="", metavar="FILE", help=file)
    metrics = "fid,sfid,inception_score,kid,cmmd,precision_recall,density_coverage,memorisation,"
    metrics += "fid_infinity (default: what preset and reference allow)"
    add("--metrics", default="", metavar="NAME,...", help=metrics)
    reference = "statistics (.npz of ADM, torch-fidelity, EDM, ours; EDM2's .pkl), images in an "
    reference += ".npz or a folder (default: the run's own images)"
    add("--reference", default="", metavar="FILE_OR_DIR", help=reference)
    few = "Frechet distances from no more images than features"
    add("--allow-few", action="store_true", help=few)
    labels = "of samples: the classes in turn, or drawn"
    add("--labels", default="balanced", choices=["balanced", "random"], help=labels)
    keep = "writes every sample to a new folder, as INDEX.png"
    add("--keep", default="", metavar="DIR", help=keep)
    dataset = "prints what was published for it beside ours: celebahq, ffhq, imagenet, ..."
    add("--dataset", default="", metavar="NAME", help=dataset)
    images = "measures a folder of images or an .npz instead of a run; results go to --out"
    add("--images", default="", metavar="DIR_OR_NPZ", help=images)
    add("--out", default=None, metavar="DIR", help="of --images; with --stats-only a new .npz")
    stats = "writes statistics of --images for a --reference, and measures nothing"
    add("--stats-only", action="store_true", help=stats)


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
    """Fields of `jobs.sample.Settings`, in groups; lists are text that the command line reads."""
    add = verb.add_argument_group("which samples").add_argument
    add("--classes", default="", metavar="I,J,...", help="classes in turn (default: all)")
    add("--seed", type=int, default=0)
    add("--noise", default="", metavar="FILE.npy", help="initial noise f32 [N,H,W,C] of latents")
    add("--batch-size", type=int, default=0, help="images at a time over all devices")
    average = "auto, params, ema, or ema-NAME of another average, as ema-0.999 or ema-power-0.05"
    add("--weights", default="auto", help=average)
    add("--step", type=int, default=-1, help="checkpoint (default: the newest)")

    add = verb.add_argument_group("sampler").add_argument
    add("--sampler", default="ddim", metavar="NAME", help="ddim, ddpm, dpmpp_2m, heun, unipc, ...")
    add("--steps", type=int, default=50, help="denoising steps (default: 50)")
    spacing = "of the steps: leading, trailing, karras:7, ... (default: the process' own)"
    add("--spacing", default="auto", metavar="NAME[:NUMBER]", help=spacing)
    add("--eta", type=float, default=-1.0, help="sampler's noise, 0..1 (default: its own)")
    add("--temperature", type=float, default=1.0, help="multiplies the noise of the steps")
    churn = "of sampler edm: S_churn[,S_tmin,S_tmax[,S_noise]] (default: 40,0.05,50,1.003)"
    add("--churn", default="", metavar="AMOUNT,...", help=churn)
    add("--order", type=int, default=0, metavar="1..3", help="of sampler unipc (default: 2)")
    clip = "keeps predicted latents, of deviation 1, within -VALUE..VALUE"
    add("--clip-x0", type=float, default=0.0, metavar="VALUE", help=clip)
    threshold = "shrinks predicted latents until this quantile of their size is at --clip-x0"
    add("--threshold-x0", type=float, default=0.0, metavar="QUANTILE", help=threshold)

    group = verb.add_argument_group(
        "guidance",
        "Leads from the null condition's prediction to the condition's; with a --guide-..., from a "
        "worse denoiser's of the same latents to this one's (autoguidance).",
    )
    add = group.add_argument
    scale = "1 = conditional model only, >1 extrapolates (default: 1)"
    add("--guidance", type=float, default=1.0, metavar="SCALE", help=scale)
    times = "guided times, where 0 is data and 1 the noise end (default: 0,1)"
    add("--guidance-interval", default="0,1", metavar="LOW,HIGH", help=times)
    phi = "0..1: how far to go back to the unguided prediction's deviation"
    add("--guidance-rescale", type=float, default=0.0, metavar="PHI", help=phi)
    projection = "APG: share 0..1 of what lies along the predicted x0, greatest norm of the change"
    add("--guidance-projection", default="", metavar="ETA[,NORM]", help=projection)
    channels = "of the latent, from 0 (default: all)"
    add("--guided-channels", default="", metavar="I,J,...", help=channels)
    guide = "run of the worse denoiser (default: this WORKDIR, at another step or other weights)"
    add("--guide-workdir", default="", metavar="DIR", help=guide)
    add("--guide-step", type=int, default=-1, help="its checkpoint (default: its newest)")
    add("--guide-weights", default="auto", metavar="NAME", help="as --weights")

    group = verb.add_argument_group(
        "images to start from",
        "Sample i begins at image i, in turn: noised and denoised again (--strength), or repainted "
        "where its mask is white, with its other pixels kept.",
    )
    add = group.add_argument
    where = "folder of images, or uint8 [N,H,W,3] as `ldm sample` writes"
    add("--init-images", default="", metavar="DIR_OR_NPZ", help=where)
    strength = "share of the steps taken from the noised image; 1 = all, from noise (default: 1)"
    add("--strength", type=float, default=1.0, help=strength)
    masks = "white = repaint; one for each image by name, or one for all; .npz: uint8 [N,H,W]"
    add("--masks", default="", metavar="DIR_OR_NPZ", help=masks)


def _add_sizes(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("size", "In pixels, by the same weights at other sizes.")
    add = group.add_argument
    add("--size", default="", metavar="H[,W]", help="of the samples (default: as trained)")
    tile = "side of overlapping tiles that are denoised one by one (default: the whole at once)"
    add("--tile", type=int, default=0, metavar="SIZE", help=tile)
    overlap = "of neighbouring tiles (default: half of one)"
    add("--tile-overlap", type=int, default=-1, metavar="N", help=overlap)
