"""Images in a folder: a class per sub-folder, or a `metadata.jsonl` with captions."""

import json
import os
import posixpath
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm_jax.data import pixels
from ldm_jax.data.fields import CAPTION, LABEL
from ldm_jax.data.sources import Example, Source
from ldm_jax.errors import InputError
from ldm_jax.files import digest, digest_json

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HELD_OUT_NAMES = ("val", "validation", "test")
METADATA = "metadata.jsonl"


class _Entry(NamedTuple):
    path: str  # relative to the split's folder, with forward slashes
    size: int  # bytes
    class_name: str | int
    caption: str


def folder(root: str, split: str, held_out_fraction: float) -> Source:
    """The images under `root`, sorted by path; local, or any address that fsspec knows (gs://).

    Sub-folders train/ and val/ (or validation/, test/) are the splits; otherwise an image is held
    out by the hash of its path, so that new files never move others. With `metadata.jsonl` beside
    the images, {"file_name", "text", optional "label"} a line, the images are those it names.

    Sub-folders without images are no classes; the classes are those of the training split.

    Raises InputError for a missing or empty folder, an image outside every class, a held-out class
    that training lacks, and metadata that is malformed or names a missing file.
    """
    files = _listing(root)
    top = {f.partition("/")[0] for f in files if "/" in f}
    held_out_name = next((n for n in HELD_OUT_NAMES if n in top), None)
    if METADATA not in files and "train" in top and held_out_name:
        train = _entries(root, "train", files)
        names = _class_names(train, f"{root}/train")
        prefix = "train" if split == "train" else held_out_name
        entries = train if split == "train" else _entries(root, prefix, files)
        strangers = sorted({str(e.class_name) for e in entries} - set(names))
        if strangers:
            raise InputError(
                f"folder {root}/{prefix} has the classes {strangers[:5]} that {root}/train lacks; "
                "add images of them there or remove them here"
            )
    else:
        prefix = "train" if top == {"train"} and METADATA not in files else ""
        entries = _entries(root, prefix, files)
        names = _class_names(entries, os.path.join(root, prefix))
        wanted = split == "held_out"
        entries = [e for e in entries if _is_held_out(e.path, held_out_fraction) == wanted]
    base = f"{root.rstrip('/')}/{prefix}".rstrip("/")
    numbers = {name: i for i, name in enumerate(names)}

    def load(indices: np.ndarray) -> list[Example]:
        out = []
        for i in indices:
            entry = entries[i]
            path = f"{base}/{entry.path}"
            image, label = pixels.decode(_read(path), path), numbers[str(entry.class_name)]
            out.append({"image": image, "label": label, "caption": entry.caption})
        return out

    return Source(
        num_examples=len(entries),
        class_names=names,
        fields=(LABEL, CAPTION) if any(e.caption for e in entries) else (LABEL,),
        identity=digest_json(["folder", names, [list(e) for e in entries]]),
        listing=digest_json(
            ["folder", names, [[e.path, e.class_name, e.caption] for e in entries]]
        ),
        load=load,
    )


def image_files(root: str) -> list[str]:
    """Paths relative to `root` of all images under it, sorted, classes or not.

    Raises InputError for a missing folder and for one without images.
    """
    return sorted(name for name in _listing(root) if name.rpartition("/")[2] != METADATA)


def read_image(root: str, name: str) -> Image.Image:
    """The image called `name` in `image_files(root)`, as RGB; InputError where it is broken."""
    path = f"{root.rstrip('/')}/{name}"
    return pixels.decode(_read(path), path)


def _listing(root: str) -> dict[str, int]:
    """Path relative to root -> bytes, of every image and metadata file, hidden ones left out."""
    if not root:
        raise InputError("the folder source needs a path; set path= to a folder of images")
    found: dict[str, int] = {}
    if "://" in root:
        fs, base = _remote(root)
        for name, info in fs.find(base, detail=True).items():
            found[name[len(base) :].lstrip("/")] = info["size"]
    else:
        # Sub-folders are often links into a larger store, hence followlinks.
        for at, _, names in os.walk(root, followlinks=True):
            for name in names:
                path = os.path.join(at, name)
                if name == METADATA or name.lower().endswith(EXTENSIONS):
                    relative = os.path.relpath(path, root).replace(os.sep, "/")
                    found[relative] = os.path.getsize(path) if os.path.exists(path) else -1
    kept = {
        f: size
        for f, size in found.items()
        if (f.lower().endswith(EXTENSIONS) or f.rpartition("/")[2] == METADATA)
        and not any(part.startswith(".") for part in f.split("/"))
    }
    if not kept and not found and "://" not in root and not os.path.isdir(root):
        fault = "is a file" if os.path.exists(root) else "does not exist"
        raise InputError(f"folder {root} {fault}; give a folder of images")
    if not any(f.lower().endswith(EXTENSIONS) for f in kept):
        raise InputError(
            f"folder {root} holds no images ({', '.join(EXTENSIONS)}); give one that does"
        )
    return kept


def _remote(address: str):
    import fsspec  # only for addresses such as gs://

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot open {address}: {error}; install the file system's package (gs:// needs gcsfs)"
        ) from error


def _read(path: str) -> bytes:
    try:
        if "://" in path:
            fs, name = _remote(path)
            return fs.cat_file(name)
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(
            f"cannot read image {path}: {error}; the folder must not change while it is read: "
            "restore the file or start again"
        ) from error


def _entries(root: str, prefix: str, files: dict[str, int]) -> list[_Entry]:
    inside = f"{prefix}/" if prefix else ""
    where = f"{root.rstrip('/')}/{prefix}".rstrip("/")
    sizes = {f[len(inside) :]: size for f, size in files.items() if f.startswith(inside)}
    if METADATA in sizes:
        return _from_metadata(where, sizes)
    sizes = {f: size for f, size in sizes.items() if not f.endswith(METADATA)}
    loose = sorted(f for f in sizes if "/" not in f)
    if loose and len(loose) < len(sizes):
        raise InputError(
            f"folder {where} has images in sub-folders (classes) and beside them, such as "
            f"{loose[0]}; move those into a class or the classes away"
        )
    names = {f: "all" if loose else f.partition("/")[0] for f in sizes}
    return [_Entry(f, sizes[f], names[f], "") for f in sorted(sizes)]


def _from_metadata(where: str, sizes: dict[str, int]) -> list[_Entry]:
    path = f"{where}/{METADATA}"
    entries, labelled = [], 0
    for number, line in enumerate(_read(path).decode("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = posixpath.normpath(row["file_name"])
            text, label = row.get("text", ""), row.get("label")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f'{path} line {number} must be a JSON object with "file_name" and "text" '
                f"({type(error).__name__}: {error}); correct the line"
            ) from error
        if name not in sizes:
            raise InputError(
                f"{path} line {number} names {name!r}, which is no image under {where}; add the "
                "file or remove the line"
            )
        valid_label = label is None or isinstance(label, str) or (type(label) is int and label >= 0)
        if not isinstance(text, str) or not valid_label:
            raise InputError(
                f'{path} line {number}: "text" must be a string and "label" a string or an integer '
                f"from 0, not {text!r} and {label!r}; correct the line"
            )
        labelled += label is not None
        entries.append(_Entry(name, sizes[name], "all" if label is None else label, text))
    kinds = {type(e.class_name) for e in entries}
    if labelled not in (0, len(entries)) or len(kinds) > 1:
        raise InputError(
            f'{path}: {labelled} of {len(entries)} lines have a "label"; it must be on every line '
            "or on none, all integers or all strings"
        )
    repeated = len(entries) - len({e.path for e in entries})
    if repeated or not entries:
        raise InputError(
            f"{path} has {len(entries)} lines, {repeated} of them for a file named before; each "
            "image needs exactly one line"
        )
    return sorted(entries)


def _class_names(entries: list[_Entry], where: str) -> tuple[str, ...]:
    if not entries:
        raise InputError(f"folder {where} holds no images; set path= to one that does")
    values = {e.class_name for e in entries}
    if any(isinstance(v, int) for v in values):
        return tuple(str(i) for i in range(max(values) + 1))
    return tuple(sorted(values))


def _is_held_out(path: str, fraction: float) -> bool:
    return int(digest(path)[:16], 16) < fraction * 2.0**64
