"""`ldm weights`: published weights of a frozen network to the one file that our jobs read."""

import http.client
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm_jax.errors import InputError
from ldm_jax.files import replacing, sha256
from ldm_jax.interop import pretrained, published
from ldm_jax.interop.published import Published

TIMEOUT = 60  # seconds without an answer


def run(
    name: str, files: Sequence[Path] = (), out: Path | None = None, unverified: bool = False
) -> Path:
    """Converts `files`, or fetches the published ones; returns the path of what it wrote.

    Raises InputError for files other than the published ones (unless `unverified`), for tensors
    that do not fit, for an `out` that stands already, and where nothing can be fetched.
    """
    out = Path(out) if out else pretrained.default_path(name)
    if out.exists():
        raise InputError(f"{out} is there already; remove it, or name another file with --out")
    if out.suffix != ".safetensors":
        raise InputError(f"--out={out} must end in .safetensors; name it so")
    parts = published.PUBLISHED[name]
    if not unverified:
        published.check_known(name)
    for file in files or [p.file for p in parts]:
        pretrained.check_readable(file)
    for file in files:
        if not file.is_file():
            raise InputError(f"--from: {file} is no file; give the paths of what you downloaded")
    kept = {p.file for p in parts if p.sha256 and (out.parent / p.file).is_file()}
    sources = list(files) or [fetch(name, part, out.parent) for part in parts]
    if not unverified:
        published.check(name, sources)
    origin = {path.name: sha256(path) for path in sources}
    pretrained.save(out, pretrained.convert(name, sources), origin)
    for path in sources:
        if not files and path.name not in kept:  # what the user has fetched stays
            path.unlink()
    return out


def fetch(name: str, part: Published, folder: Path) -> Path:
    """Downloads a published file into `folder`; one of its digest that stands there is kept."""
    path = folder / part.file
    if path.is_file() and sha256(path) == part.sha256:
        return path
    if path.exists() and not part.sha256:
        raise InputError(f"{path} is in the way of a download; give it with --from, or remove it")
    print(f"fetching {part.url}", flush=True)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            for chunk in _chunks(name, part):
                file.write(chunk)
        found = sha256(temporary)
        if part.sha256 and found != part.sha256:
            raise InputError(
                f"{part.url} arrived with the sha256 {found[:8]}.., not "
                f"{part.sha256[:8]}..: try again, or get it elsewhere and give it with --from"
            )
    return path


def _chunks(name: str, part: Published) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(part.url, timeout=TIMEOUT) as response:
            while chunk := response.read(2**20):
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        files = ",".join(p.file for p in published.PUBLISHED[name])
        raise InputError(
            f"{part.url} cannot be fetched ({getattr(error, 'reason', None) or error}); "
            f"download it elsewhere and run `ldm weights {name} --from={files}`"
        ) from error
