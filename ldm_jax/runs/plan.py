"""An experiment's plan: its arms as settings of runs, what they wait for, and what is refused.

An arm may begin with another's weights (`init_from`), or be trained as long as another was
(`as_long_as`); those are trained first, whatever the order of the table.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.data.images import open_images
from ldm_jax.errors import InputError
from ldm_jax.files import absolute
from ldm_jax.interop import pretrained
from ldm_jax.runs.build import denoiser_training, facts_of_config, resolve_widths
from ldm_jax.runs.config_files import build, config_dict, group, load_config_file
from ldm_jax.runs.initial import check_kept, check_same_model
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun, Run
from ldm_jax.runs.workdir import read_run
from ldm_jax.sharding import check_batch, make_mesh
from ldm_jax.train.ema import average_names
from ldm_jax.train.step import check_traces


@dataclasses.dataclass(frozen=True)
class Arm:
    """What a plan says of one kind of run; seeds and places are filled in for each."""

    run: Run
    first_stage: AutoencoderRun | None = None  # of a denoiser
    start: str = ""  # arm whose run of the same seed it begins with; "" = none
    # (ARM, YARDSTICK): as many steps as train in ARM's time, at YARDSTICK's speed; () = its own
    as_long_as: tuple[str, ...] = ()

    @property
    def after(self) -> tuple[str, ...]:
        """The arms that are trained first."""
        return tuple(name for name in (self.start, *self.as_long_as) if name)


def load_plan(spec: str, images: str = "") -> dict[str, Any]:
    """The plan of FILE[:VARIANT]; with a folder of `images`, of those in the place of its own."""
    own = {"images": {"source": "folder", "path": absolute(images)}} if images else {}
    return load_config_file(spec) | own


def read_first_stages(plan: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms of a comparison of first stages, checked; see `jobs.experiment.first_stages`."""
    check_names(plan, {"arms", "seeds"}, {"first_stage", "contrasts", "images"})
    base, arms = load_config_file(plan["first_stage"]) if "first_stage" in plan else {}, {}
    for name in plan["arms"]:
        with in_arm(name):
            fields, as_long_as = _pop_as_long_as(plan["arms"][name])
            run = layered(AutoencoderRun, base, fields, _images_of(plan))
            check_first_stage(run)
            _check_seeds(run, plan["seeds"])
            arms[name] = Arm(run, as_long_as=as_long_as)
    return _checked(plan, arms)


def read_denoisers(plan: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms of a comparison of denoisers, checked; see `jobs.experiment.denoisers`."""
    needed = {"first_stage", "denoiser", "arms", "samples", "seeds"}
    check_names(plan, needed, {"judge", "reference", "contrasts", "images"})
    base, arms, traced = load_config_file(plan["denoiser"]), {}, set[str]()
    shared = shared_first_stage(plan)
    for name in plan["arms"]:
        with in_arm(name):
            fields, as_long_as = _pop_as_long_as(plan["arms"][name])
            first = fields.pop("first_stage", {})
            named = isinstance(first, str)
            first_stage = layered(
                AutoencoderRun,
                load_config_file(first if named else plan["first_stage"]),
                {} if named else first,
                _images_of(plan),
            )
            run = layered(DenoiserRun, base, fields)
            arms[name] = Arm(run, first_stage, run.init_from, as_long_as)
            if first_stage.images != shared.images:
                raise InputError(
                    f"its first stage has {first_stage.images}, and the plan's has "
                    f"{shared.images}; arms are compared on the same images"
                )
            _check_denoiser(run, first_stage, traced)
            _check_seeds(run, plan["seeds"])
    for name, arm in arms.items():
        if arm.start:
            with in_arm(name):
                if arm.start not in arms:
                    raise InputError(
                        f"init_from {arm.start!r} must be an arm of the plan, one of {list(arms)}"
                    )
                _check_start(arm, arms[arm.start])
    return _checked(plan, arms)


def shared_first_stage(plan: Mapping[str, Any]) -> AutoencoderRun:
    """That of every arm without one of its own."""
    return layered(AutoencoderRun, load_config_file(plan["first_stage"]), _images_of(plan))


def _images_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the plan's `images` change of a first stage."""
    return {"images": plan["images"]} if "images" in plan else {}


def training_order(arms: Mapping[str, Arm]) -> list[str]:
    """The arms in the order of the table, each after those it waits for; InputError in a circle."""
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise InputError(f"arms wait for each other: {circle}; take one of these out")
        for other in arms[name].after:
            visit(other, (*path, name))
        if name not in order:
            order.append(name)

    for name in arms:
        visit(name, ())
    return order


def families(arms: Mapping[str, Arm], most: int) -> list[list[str]]:
    """The arms in groups of at most `most`; those that go back to one arm's weights together."""

    def root(name: str) -> str:
        return root(arms[name].start) if arms[name].start else name

    related: dict[str, list[str]] = {}
    for name in arms:
        related.setdefault(root(name), []).append(name)
    groups: list[list[str]] = []
    for family in related.values():
        if groups and len(groups[-1]) + len(family) <= most:
            groups[-1] += family
        else:
            groups += [family[i : i + most] for i in range(0, len(family), most)]
    return groups


def check_names(plan: Mapping[str, Any], needed: set[str], optional: set[str]) -> None:
    """InputError for what is missing, unknown, or not of the kind that it must be."""
    if not needed <= plan.keys() <= needed | optional or not all(plan[name] for name in needed):
        raise InputError(
            f"the plan has {sorted(plan)}; it must give {sorted(needed)}, none of it empty, and "
            f"may give {sorted(optional)}"
        )
    group(plan["arms"], "arms")
    for name, fields in plan["arms"].items():
        group(fields, f"arms.{name}")
    for name in {"first_stage", "denoiser"} & plan.keys():
        if not isinstance(plan[name], str):
            raise InputError(f"{name} is {plan[name]!r}; it must be the text FILE:VARIANT")
    check_tuple(plan["seeds"], "seeds")
    whole = [s for s in plan["seeds"] if isinstance(s, int) and not isinstance(s, bool)]
    if len({*whole}) < len(plan["seeds"]):
        raise InputError(f"seeds is {tuple(plan['seeds'])}; it must be different whole numbers")


def check_tuple(value: Any, name: str) -> None:
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} is {value!r}; it must be a tuple")


@contextlib.contextmanager
def in_arm(name: str) -> Iterator[None]:
    """Errors of the block say of which arm they are."""
    try:
        yield
    except InputError as error:
        raise InputError(f"arm {name!r}: {error}") from error


def layered(cls: type, *layers: dict[str, Any]) -> Any:
    """A run's settings from config values one on top of the other."""
    return build(cls, config_dict(cls, *layers).to_dict())


def check_first_stage(config: AutoencoderRun) -> None:
    """InputError for a batch that does not divide, and for images or weights that are missing."""
    check_batch(config.batch_size, make_mesh(config.mesh), parts=config.accumulate)
    for split in ("train", "held_out"):
        open_images(config.images, split, augment=False)
    if config.loss.perceptual_weight:
        pretrained.load("lpips", config.loss.perceptual_file)
    if config.init_from:
        read_run(Path(config.init_from))


def _pop_as_long_as(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """An arm's fields of a run, and its `as_long_as`."""
    fields = dict(fields)
    pair = fields.pop("as_long_as", ())
    if not isinstance(pair, list | tuple) or len(pair) not in (0, 2):
        raise InputError(f"as_long_as is {pair!r}; it must be the names of two arms")
    if pair and fields.get("lpl"):
        raise InputError(
            "as_long_as finds the steps, and lpl must know them beforehand; give the arm num_steps"
        )
    if pair and "num_steps" in fields:
        raise InputError(
            f"num_steps {fields['num_steps']} is what as_long_as finds; leave out one of the two"
        )
    return fields, tuple(pair)


def _check_seeds(config: Run, seeds: Iterable[int]) -> None:
    for seed in seeds:
        dataclasses.replace(config, seed=seed)  # for its errors alone


def _check_denoiser(config: DenoiserRun, first_stage: AutoencoderRun, traced: set[str]) -> None:
    """InputError for a first stage and a denoiser that do not go together.

    `traced` takes what was traced, which other arms need not be then.
    """
    check_first_stage(first_stage)
    for name in ("autoencoder", "latents"):
        if getattr(config, name):
            raise InputError(
                f"{name} {getattr(config, name)!r} is the experiment's to set; name a first stage "
                "to train with `first_stage`"
            )
    check_batch(config.batch_size, make_mesh(config.mesh), parts=config.accumulate)
    source = open_images(first_stage.images, "train", augment=False)
    facts = dataclasses.replace(
        facts_of_config(config, first_stage.model),
        fields={field.name: field.shape for field in source.fields},
        num_classes=source.num_classes,
    )
    training = denoiser_training(config, facts)
    shown = (config.model, config.codec, config.objective, config.lpl, config.batch_size)
    key = repr((*shown, first_stage.model))
    if key not in traced:  # once for all arms of one program
        check_traces(training)
        traced.add(key)


def _check_start(arm: Arm, other: Arm) -> None:
    """InputError where a run of `other` has not what one of `arm` begins with."""
    ours, theirs = _resolved(arm), _resolved(other)
    if arm.first_stage != other.first_stage:
        raise InputError(
            f"init_from {arm.start!r} has another first stage; begin with an arm of the same, or "
            "leave init_from out"
        )
    check_same_model(ours, theirs)
    check_kept(ours, theirs)
    known = ["params", *average_names(theirs.ema)]
    if theirs.weights_named(ours.init_weights) not in known:
        raise InputError(
            f"init_weights {ours.init_weights!r}: arm {arm.start!r} has {known}; choose one"
        )
    kept = average_names(ours.ema) if ours.init_averages == "keep" else []
    if not set(kept) <= set(known):
        raise InputError(
            f"init_averages 'keep' goes on with {kept}, and arm {arm.start!r} has {known[1:]}; "
            "give both the same ema, or restart them"
        )


def _resolved(arm: Arm) -> DenoiserRun:
    """The arm's run, with the channels of its latents."""
    assert isinstance(arm.run, DenoiserRun) and arm.first_stage
    return resolve_widths(arm.run, facts_of_config(arm.run, arm.first_stage.model))


def _checked(plan: Mapping[str, Any], arms: dict[str, Arm]) -> dict[str, Arm]:
    """The arms; InputError for those that wait in vain, and for contrasts of others."""
    for name, arm in arms.items():
        with in_arm(name):
            for other in arm.as_long_as:
                _check_clocked(other, arms)
    training_order(arms)
    for name, coefficients in group(plan.get("contrasts", {}), "contrasts").items():
        _check_contrast(name, group(coefficients, f"contrasts.{name}"), list(arms))
    return arms


def _check_clocked(name: str, arms: Mapping[str, Arm]) -> None:
    if name not in arms:
        raise InputError(f"as_long_as {name!r} must be an arm of the plan, one of {list(arms)}")
    run = arms[name].run
    if not arms[name].as_long_as and run.num_steps <= run.log_every:
        raise InputError(
            f"as_long_as {name!r}: its first line of metrics has the compilation in it, and "
            f"{run.num_steps} steps with log_every {run.log_every} give no second; lower log_every"
        )


def _check_contrast(name: str, coefficients: dict[str, Any], arms: Sequence[str]) -> None:
    unknown = sorted(coefficients.keys() - set(arms))
    if unknown or not coefficients:
        raise InputError(
            f"contrast {name!r} is of {unknown or 'no arms'}; it must be of arms of the plan, "
            f"{list(arms)}"
        )
    for arm, value in coefficients.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"contrasts.{name}.{arm} is {value!r}; it must be a number")
