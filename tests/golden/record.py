"""Records what a refactoring may not move: losses, samples, a cache, checkpoints, figures.

    python -m tests.golden.record OUT.json [--workdir=DIR]       the numbers of this commit
    python -m tests.golden.record --compare A.json B.json        equal bit for bit?

Machines round differently, so two files are held against each other bit for bit only where one
machine wrote both; the suite holds `numbers.json` to 1e-4, and its paths exactly. Everything goes
through the command line and the files that it leaves, so that any commit can be recorded.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).with_name("config.py")
SAMPLES = {  # flags of `ldm sample`, by the variant that is sampled
    "denoiser": ["--steps=4", "--guidance=2", "--eta=0.5"],
    "flow": ["--sampler=heun", "--steps=3", "--guidance=1.5", "--guidance-interval=0.1,0.9"],
    "edm": ["--sampler=edm", "--steps=3", "--churn=1"],
}


def ldm(*arguments: str) -> None:
    from ldm_jax import cli

    cli.main(list(arguments))


def train_first_stage(root: Path) -> None:
    ldm("train-autoencoder", f"--config={CONFIG}:autoencoder", f"--workdir={root / 'autoencoder'}")
    ldm("cache-latents", f"--workdir={root / 'autoencoder'}", "--pack=8", "--batch-size=64")


def train_and_sample(root: Path, variant: str) -> None:
    workdir = root / variant
    ldm(
        "train-denoiser",
        f"--config={CONFIG}:{variant}",
        f"--config.autoencoder={root / 'autoencoder'}",
        f"--workdir={workdir}",
    )
    out = workdir / "samples.npz"
    flags = ["--num=16", "--batch-size=16", f"--out={out}", *SAMPLES[variant]]
    ldm("sample", f"--workdir={workdir}", *flags)


def evaluate(root: Path, classifier: bool) -> None:
    ldm("evaluate", f"--workdir={root / 'autoencoder'}", "--num=64")
    sampled = ["--num=32", "--steps=3", "--batch-size=16"]
    if classifier:
        ldm("evaluate", f"--workdir={root / 'denoiser'}", *sampled)
    judged = ["--extractor=random-conv", "--allow-few", "--guidance=2"]
    ldm("evaluate", f"--workdir={root / 'denoiser'}", *sampled, *judged)


def losses(workdir: Path) -> list[dict[str, float]]:
    """Every line of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def checkpoint(workdir: Path) -> dict[str, list[str]]:
    """Item -> paths of its arrays with their shapes, of the newest checkpoint."""
    newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    found: dict[str, list[str]] = {}
    for item in sorted(p for p in newest.iterdir() if p.is_dir()):
        found[item.name] = []
        if (item / "_METADATA").exists():
            tree = json.loads((item / "_METADATA").read_text())["tree_metadata"]
            for entry in tree.values():
                path = "/".join(key["key"] for key in entry["key_metadata"])
                shape = entry["value_metadata"].get("write_shape")
                found[item.name].append(f"{path} {shape}")
            found[item.name].sort()
    return found


def cache(folder: Path) -> dict:
    manifest = json.loads((folder / "manifest.json").read_text())
    digests = [shard["sha256"] for shard in manifest["shards"]]
    # The encoder's weights differ by rounding from machine to machine, and so do all digests.
    return {"digests": digests, **{k: manifest[k] for k in ("mean", "std", "global_std")}}


def samples(path: Path) -> dict:
    images = np.load(path)["arr_0"]
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return {"digest": digest, "shape": list(images.shape), "mean": float(images.mean())}


def figures(workdir: Path) -> list[dict[str, float]]:
    lines = (workdir / "evaluation.jsonl").read_text().splitlines()
    return [json.loads(line)["figures"] for line in lines]


def record(root: Path, variants=("denoiser", "flow", "edm"), *, classifier: bool = True) -> dict:
    """Runs everything in `root`; what there is to compare, as plain values.

    Figures by a `classifier`, which is trained for them, are told apart by one machine alone.
    """
    train_first_stage(root)
    for variant in variants:
        train_and_sample(root, variant)
    evaluate(root, classifier)
    return {
        "losses": {name: losses(root / name) for name in ("autoencoder", *variants)},
        "checkpoints": {name: checkpoint(root / name) for name in ("autoencoder", *variants)},
        "cache": cache(root / "autoencoder" / "latents" / "train"),
        "samples": {name: samples(root / name / "samples.npz") for name in variants},
        "figures": {name: figures(root / name) for name in ("autoencoder", "denoiser")},
    }


def differences(a, b, where: str = "", tolerance: float = 0.0) -> list[str]:
    """Places where two records differ: numbers by more than the tolerance, all else at all."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys())
        return [
            d for n in names for d in differences(a.get(n), b.get(n), f"{where}/{n}", tolerance)
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{where}/{i}", tolerance)]
    if tolerance and isinstance(a, float) and isinstance(b, float):
        same = abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
    else:
        same = a == b or (a != a and b != b)
    return [] if same else [f"{where}: {a!r} and {b!r}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--workdir", type=Path, help="where the runs stay; else they are removed")
    arguments = parser.parse_args()
    if arguments.compare:
        a, b = (json.loads(Path(file).read_text()) for file in arguments.files)
        found = differences(a, b)
        print("\n".join(found[:40]) or "equal, bit for bit")
        return bool(found)
    with tempfile.TemporaryDirectory() as folder:
        content = record(arguments.workdir or Path(folder))
    Path(arguments.files[0]).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
