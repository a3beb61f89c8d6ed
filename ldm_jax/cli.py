"""The `ldm` command: its verbs, the processes that they run on, and errors in one line."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ldm_jax.errors import InputError
from ldm_jax.options import add_flags, read_flags

Run = Callable[[argparse.Namespace, list[str]], None]  # (flags, --config.a.b=VALUE of a run)


def main(argv: list[str] | None = None) -> None:
    """Runs one verb. Bad input prints one line and exits with status 2."""
    _environment()
    arguments, overrides = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        if "coordinator" in arguments:
            _join_processes(arguments)
        arguments.run(arguments, overrides)
    except InputError as error:
        if os.environ.get("LDM_TRACEBACK"):
            raise
        _refuse(arguments.verb, str(error))
    except OSError as error:
        if os.environ.get("LDM_TRACEBACK") or not error.filename:
            raise
        _refuse(
            arguments.verb, f"{error.filename}: {error.strerror}; check the path and its rights"
        )


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a command says: its flags, with the verb's `run`, and its --config.a.b=VALUE."""
    overrides = [a for a in argv if a.startswith(("--config.", "--noconfig."))]
    argv = [a for a in argv if a not in overrides]
    parser = argparse.ArgumentParser(
        prog="ldm",
        description="Latent diffusion models in JAX, from raw images to samples and metrics.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        flags = verbs.add_parser(name, help=verb.text, description=verb.text)
        if argv[:1] == [name]:  # what the other verbs stand on is never imported
            run = verb.prepare(flags)
            flags.set_defaults(run=run, error=flags.error)
    arguments = parser.parse_args(argv)
    if overrides and "config" not in arguments:
        arguments.error(f"{overrides[0]}: this verb takes no configuration")
    return arguments, overrides


def _refuse(verb: str, message: str) -> None:
    print(f"ldm {verb}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _environment() -> None:
    """Quiet libraries and one compilation cache; what the user has set stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ldm_jax" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _add_run(flags: argparse.ArgumentParser, *, workdir: str = "", required: bool = True) -> None:
    """The run directory, by default `workdir`, and the processes that share the work."""
    flags.add_argument(
        "--workdir",
        type=Path,
        required=required and not workdir,
        default=workdir or None,
        metavar="DIR",
        help="run directory" + (f" (default: {workdir})" if workdir else ""),
    )
    group = flags.add_argument_group("processes")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num-processes", type=int, metavar="N", help="of the whole job")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--distributed", action="store_true", help="join as the cluster says (TPU pods, SLURM, GKE)"
    )


def _join_processes(arguments: argparse.Namespace) -> None:
    """Joins the processes of one job, before anything else touches a device."""
    import jax

    if arguments.coordinator:
        if arguments.num_processes is None or arguments.process_id is None:
            raise InputError("--coordinator needs --num-processes and --process-id too")
        jax.distributed.initialize(
            arguments.coordinator, arguments.num_processes, arguments.process_id
        )
    elif arguments.num_processes is not None or arguments.process_id is not None:
        raise InputError("--num-processes and --process-id need --coordinator=HOST:PORT too")
    elif arguments.distributed:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"--distributed found no cluster to join ({str(error).splitlines()[0]}); name the "
                "processes with --coordinator, --num-processes and --process-id"
            ) from error


def _demo(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import demo

    _add_run(flags, workdir="runs/demo")
    return lambda arguments, _: demo.run(arguments.workdir)


def _train_autoencoder(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import train_autoencoder
    from ldm_jax.runs.settings import AutoencoderRun

    return _training(flags, "train-autoencoder", AutoencoderRun, train_autoencoder.run)


def _train_denoiser(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import train_denoiser
    from ldm_jax.runs.settings import DenoiserRun

    return _training(flags, "train-denoiser", DenoiserRun, train_denoiser.run)


def _training(flags: argparse.ArgumentParser, job: str, cls: type, train: Callable) -> Run:
    """A training by the configuration file, or by that of the workdir, which it resumes."""
    from ldm_jax.runs import config_files
    from ldm_jax.runs.workdir import check_trainable, read_run

    _add_run(flags)
    flags.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="not needed to resume a workdir; fields are changed with --config.a.b=VALUE",
    )

    def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
        workdir = arguments.workdir
        check_trainable(workdir)
        if arguments.config:
            config = config_files.load_run(cls, arguments.config, overrides)
        elif not (workdir / "run.json").is_file():
            raise InputError(
                f"workdir {workdir} holds no run to go on with; give --config=FILE[:VARIANT] to "
                "start one there"
            )
        else:
            record = read_run(workdir, job)
            config = config_files.apply_overrides(cls, record["config"], overrides)
        train(config, workdir)

    return run


def _cache_latents(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import cache_latents

    _add_run(flags)
    flags.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the cache (default: WORKDIR/latents)"
    )
    add_flags(flags, cache_latents.CacheOptions)

    def run(arguments: argparse.Namespace, _: list[str]) -> None:
        options = read_flags(cache_latents.CacheOptions, arguments)
        cache_latents.run(arguments.workdir, options, arguments.out)

    return run


def _sample(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import sample
    from ldm_jax.sampling.options import SampleOptions

    flags.usage = "%(prog)s --workdir=DIR [--FLAG=VALUE ...]"
    _add_run(flags)
    flags.add_argument("--out", type=Path, help="writes OUT.npz and OUT.png")
    add_flags(flags, SampleOptions)

    def run(arguments: argparse.Namespace, _: list[str]) -> None:
        options = read_flags(SampleOptions, arguments)
        print(sample.run(arguments.workdir, options, arguments.out))

    return run


def _evaluate(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.eval.judge import JudgeOptions
    from ldm_jax.jobs import evaluate
    from ldm_jax.sampling.options import SampleOptions

    flags.usage = "%(prog)s (--workdir=DIR | --images=SET --out=DIR) [--FLAG=VALUE ...]"
    _add_run(flags, required=False)
    add_flags(flags, evaluate.EvaluateOptions)
    add_flags(flags, JudgeOptions)
    add_flags(flags, SampleOptions, but=evaluate.NOT_SAMPLED)
    flags.set_defaults(preset="")

    def run(arguments: argparse.Namespace, _: list[str]) -> None:
        judge = None
        if any(getattr(arguments, name) for name in JudgeOptions.__dataclass_fields__):
            arguments.preset = arguments.preset or ("custom" if arguments.extractor else "adm")
            judge = read_flags(JudgeOptions, arguments)
        options = read_flags(evaluate.EvaluateOptions, arguments)
        samples = read_flags(SampleOptions, arguments, but=evaluate.NOT_SAMPLED)
        evaluate.run(arguments.workdir, options, samples, judge)

    return run


def _ema(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import ema

    _add_run(flags)
    flags.add_argument(
        "--width", type=float, required=True, help="sigma_rel, a share of the training, as 0.12"
    )
    flags.add_argument("--step", type=int, default=-1, help="as of it (default: the last snapshot)")
    flags.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new run directory (default: WORKDIR/ema/width-WIDTH-stepSTEP)",
    )
    return lambda arguments, _: ema.run(
        arguments.workdir, arguments.width, arguments.step, arguments.out
    )


def _weights(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.interop.pretrained import NETWORKS
    from ldm_jax.jobs import weights

    flags.add_argument("name", choices=list(NETWORKS))
    flags.add_argument(
        "--from",
        dest="files",
        default="",
        metavar="FILE[,FILE]",
        help=".safetensors, .npz or .pth files of the weights (default: fetch the published ones)",
    )
    flags.add_argument("--out", type=Path, help="file to write (default: in the user's cache)")
    flags.add_argument(
        "--unverified", action="store_true", help="take other weights of the same shapes too"
    )

    def run(arguments: argparse.Namespace, _: list[str]) -> None:
        files = [Path(file) for file in arguments.files.split(",") if file]
        print(weights.run(arguments.name, files, arguments.out, arguments.unverified))

    return run


def _import(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import import_weights

    _add_run(flags)
    flags.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR_OR_FILE",
        help="folder of diffusers' AutoencoderKL or VQModel; .ckpt or .safetensors by CompVis",
    )
    flags.add_argument(
        "--config",
        default="",
        metavar="FILE:VARIANT",
        help="images and, for a file, architecture; fields are changed with --config.a.b=VALUE",
    )
    return lambda arguments, overrides: import_weights.run(
        arguments.source, arguments.workdir, arguments.config, overrides
    )


def _export(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import export_weights

    _add_run(flags)
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder to write")
    return lambda arguments, _: export_weights.run(arguments.workdir, arguments.out)


def _reconstruct(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import reconstruct

    _add_run(flags)
    flags.add_argument("--images", required=True, metavar="DIR", help="folder of images")
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    add_flags(flags, reconstruct.ReconstructOptions)

    def run(arguments: argparse.Namespace, _: list[str]) -> None:
        options = read_flags(reconstruct.ReconstructOptions, arguments)
        reconstruct.run(arguments.workdir, arguments.images, arguments.out, options)

    return run


def _experiment(flags: argparse.ArgumentParser) -> Run:
    from ldm_jax.jobs import experiment

    _add_run(flags)
    flags.add_argument("--config", metavar="FILE[:VARIANT]", required=True, help="the plan")
    flags.add_argument(
        "--images", metavar="DIR", help="a folder of images in the place of the plan's"
    )

    def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
        if overrides:
            raise InputError(f"{overrides[0]}: an experiment's settings stand in its file; copy it")
        if arguments.images == "":
            raise InputError("--images is empty; name a folder, or leave the flag out")
        experiment.run(arguments.config, arguments.workdir, arguments.images or "")

    return run


class Verb(NamedTuple):
    text: str  # what it does, in a line
    prepare: Callable[[argparse.ArgumentParser], Run]  # adds its flags, gives what reads them


VERBS = {
    "demo": Verb("digits, from images to samples and a report", _demo),
    "train-autoencoder": Verb("train a first stage on images", _train_autoencoder),
    "cache-latents": Verb("encode a run's images once, for training denoisers", _cache_latents),
    "train-denoiser": Verb("train a denoiser on cached latents", _train_denoiser),
    "sample": Verb("draw images from a trained denoiser", _sample),
    "experiment": Verb("train and compare the arms of a configs/experiments file", _experiment),
    "evaluate": Verb("measure a trained first stage, a denoiser or a set of images", _evaluate),
    "ema": Verb("make the average of any width from a training's snapshots", _ema),
    "weights": Verb("fetch or convert the published weights of a frozen network", _weights),
    "import": Verb("make a run directory of a first stage by diffusers or CompVis", _import),
    "export": Verb("write a first stage for diffusers", _export),
    "reconstruct": Verb("pass a folder of images through a first stage", _reconstruct),
}


if __name__ == "__main__":
    main()
