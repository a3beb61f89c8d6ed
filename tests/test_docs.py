"""What the README and the pages under docs/ say can be done, can be."""

import contextlib
import io
import re
import shlex
import tarfile
from pathlib import Path

import pytest

from ldm_jax import cli
from ldm_jax.runs import config_files, settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = {"train-autoencoder": settings.AutoencoderRun, "train-denoiser": settings.DenoiserRun}


def commands():
    """(page, arguments) of every `ldm VERB ...` of an indented or a quoted line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"(?:^    |`|&& )(ldm (?!VERB)[^`\n#]*)", text, re.M):
            arguments = shlex.split(line)[1:]
            if len(arguments) > 2 or (
                arguments[0] == "weights" and len(arguments) == 2
            ):  # not a name in a sentence
                yield pytest.param(arguments, id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("arguments", list(commands()))
def test_a_command_of_the_pages_is_understood(arguments):
    found, overrides = cli.parse(arguments)
    spec = getattr(found, "config", None)
    if spec and found.verb in RUNS:
        config_files.load_run(RUNS[found.verb], spec, overrides)


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_the_pages_name_are_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:ldm_jax|configs|benchmarks|tests|launch)/[\w/.]+)", text):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_page_for_python_runs(tmp_path, monkeypatch):
    with tarfile.open(ROOT / "tests" / "golden" / "run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "runs").mkdir()
    for old, new in (("autoencoder", "ae"), ("denoiser", "ldm")):
        (tmp_path / old).rename(tmp_path / "runs" / new)
        record = tmp_path / "runs" / new / "run.json"
        text = record.read_text().replace("@ROOT@/autoencoder", str(tmp_path / "runs" / "ae"))
        record.write_text(text)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, "docs/python.md", "exec"), names)
    assert names["images"].shape == (8, 8, 8, 3) == names["rebuilt"].shape
    assert names["labels"].tolist() == list(range(8))
    assert names["moments"].shape == (8, 4, 4, 4) and names["pictures"].shape == (8, 8, 8, 3)
    assert names["program"].as_text().count("func.func public @main") == 1
    assert all(value >= 0 for value in names["figures"].values())
