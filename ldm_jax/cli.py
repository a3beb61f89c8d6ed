"""The `ldm` command: which job, its flags, the processes it runs on, and errors in one line."""

import argparse
import os
import sys
from pathlib import Path

from ldm_jax.errors import InputError
from ldm_jax.flags import make_parser


def main(argv: list[str] | None = None) -> None:
    """Runs one verb. Bad input prints one line and exits with status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, verbs = make_parser({verb: text for verb, (text, _) in VERBS.items()})
    overrides = [a for a in argv if a.startswith(("--config.", "--noconfig."))]
    arguments = parser.parse_args([a for a in argv if a not in overrides])
    if overrides and "config" not in arguments:
        verbs[arguments.verb].error(f"{overrides[0]}: this verb takes no configuration")
    _environment()
    try:
        if "coordinator" in arguments:
            _join_processes(arguments)
        VERBS[arguments.verb][1](arguments, overrides)
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


def _refuse(verb: str, message: str) -> None:
    print(f"ldm {verb}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _environment() -> None:
    """Quiet libraries and one compilation cache; what the user has set stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ldm_jax" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


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


def _train_autoencoder(arguments, overrides):
    from ldm_jax.jobs import train_autoencoder
    from ldm_jax.runs import settings

    config = _run_config(settings.AutoencoderRun, "train-autoencoder", arguments, overrides)
    train_autoencoder.run(config, arguments.workdir)


def _train_denoiser(arguments, overrides):
    from ldm_jax.jobs import train_denoiser
    from ldm_jax.runs import settings

    config = _run_config(settings.DenoiserRun, "train-denoiser", arguments, overrides)
    train_denoiser.run(config, arguments.workdir)


def _run_config(cls, job, arguments, overrides):
    from ldm_jax.runs import config_files
    from ldm_jax.runs.workdir import check_trainable, read_run

    check_trainable(arguments.workdir)
    if arguments.config:
        return config_files.load_run(cls, arguments.config, overrides)
    record = read_run(arguments.workdir)
    if record["job"] != job:
        raise InputError(
            f"workdir {arguments.workdir} belongs to `ldm {record['job']}`, not `ldm {job}`"
        )
    return config_files.apply_overrides(cls, record["config"], overrides)


def _cache_latents(arguments, overrides):
    from ldm_jax.jobs import cache_latents

    options = cache_latents.CacheOptions(
        mirrored=arguments.mirrored,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        shard_examples=arguments.shard_examples,
        pack=arguments.pack,
        splits=tuple(arguments.splits.split(",")),
    )
    cache_latents.run(arguments.workdir, options, arguments.out)


def _sample(arguments, overrides):
    from ldm_jax.jobs import sample

    print(sample.run(arguments.workdir, _sample_settings(arguments), arguments.out))


LISTS = {
    "classes": (int, "class numbers", "0,3,7"),
    "guidance_interval": (float, "two numbers", "0.2,0.8"),
    "guidance_projection": (float, "one number or two", "0,15"),
    "guided_channels": (int, "channel numbers", "0,1,2"),
    "churn": (float, "one, three or four numbers", "40,0.05,50,1.003"),
    "size": (int, "one whole number or two", "512,768"),
}


def _sample_settings(arguments):
    from ldm_jax.sampling.options import SampleOptions

    given = {f: v for f, v in vars(arguments).items() if f in SampleOptions.__dataclass_fields__}
    for name, (kind, what, example) in LISTS.items():
        text = given.get(name, "")
        try:
            given[name] = tuple(kind(part) for part in text.split(",")) if text else ()
        except ValueError as error:
            raise InputError(
                f"--{name.replace('_', '-')} {text!r} must be {what} separated by commas, as "
                f"{example}"
            ) from error
    return SampleOptions(**given)


def _evaluate(arguments, overrides):
    from ldm_jax.eval import judge as image_judge
    from ldm_jax.jobs import evaluate

    judged = arguments.preset or arguments.extractor
    names = image_judge.JudgeOptions.__dataclass_fields__
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given["preset"] = arguments.preset or ("custom" if arguments.extractor else "adm")
    given["metrics"] = tuple(name for name in arguments.metrics.split(",") if name)
    others = ("reference", "metrics", "images", "allow_few", "extractor_file")
    alone = any(getattr(arguments, name) for name in others)
    judge = image_judge.JudgeOptions(**given) if judged or alone else None
    asked = evaluate.Asked(judge, arguments.labels, arguments.keep, arguments.dataset)
    settings = _sample_settings(arguments)
    if (arguments.workdir is None) == (not arguments.images):
        raise InputError("give --workdir=DIR of a run, or --images=DIR_OR_NPZ of a set of images")
    if not arguments.images:
        if arguments.stats_only or arguments.out:
            raise InputError("--out and --stats-only belong to --images; leave them out")
        evaluate.run(arguments.workdir, settings, asked)
    elif arguments.out is None:
        raise InputError("--images needs --out: a folder of results, a file with --stats-only")
    elif arguments.stats_only:
        evaluate.write_statistics(arguments.images, Path(arguments.out), settings, asked)
    else:
        evaluate.evaluate_set(arguments.images, Path(arguments.out), settings, asked)


def _weights(arguments, overrides):
    from ldm_jax.jobs import weights

    files = [Path(file) for file in arguments.files.split(",") if file]
    print(weights.run(arguments.name, files, arguments.out, arguments.unverified))


def _import(arguments, overrides):
    from ldm_jax.jobs import import_weights

    import_weights.run(arguments.source, arguments.workdir, arguments.config, overrides)


def _export(arguments, overrides):
    from ldm_jax.jobs import export_weights

    export_weights.run(arguments.workdir, arguments.out)


def _reconstruct(arguments, overrides):
    from ldm_jax.jobs import reconstruct

    settings = reconstruct.ReconstructOptions(size=arguments.size, batch_size=arguments.batch_size)
    reconstruct.run(arguments.workdir, arguments.images, arguments.out, settings)


def _ema(arguments, overrides):
    from ldm_jax.jobs import ema

    ema.run(arguments.workdir, arguments.width, arguments.step, arguments.out)


def _demo(arguments, overrides):
    from ldm_jax.jobs import demo

    demo.run(arguments.workdir)


def _experiment(arguments, overrides):
    from ldm_jax.jobs import experiment

    if overrides:
        raise InputError(f"{overrides[0]}: an experiment's settings stand in its file; copy it")
    experiment.run(arguments.config, arguments.workdir)


VERBS = {
    "demo": ("digits, from images to samples and a report", _demo),
    "train-autoencoder": ("train a first stage on images", _train_autoencoder),
    "cache-latents": ("encode a run's images once, for training denoisers", _cache_latents),
    "train-denoiser": ("train a denoiser on cached latents", _train_denoiser),
    "sample": ("draw images from a trained denoiser", _sample),
    "experiment": ("train and compare the arms of a configs/experiments file", _experiment),
    "evaluate": ("measure a trained first stage or denoiser", _evaluate),
    "ema": ("make the average of any width from a training's snapshots", _ema),
    "weights": ("fetch or convert the published weights of a frozen network", _weights),
    "import": ("make a run directory of a first stage by diffusers or CompVis", _import),
    "export": ("write a first stage for diffusers", _export),
    "reconstruct": ("pass a folder of images through a first stage", _reconstruct),
}


if __name__ == "__main__":
    main()
