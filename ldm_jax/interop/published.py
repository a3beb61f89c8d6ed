"""Weights of frozen networks that others published: the files, where they are, their digests.

A digest that we don't know for certain is "": such a file is taken with `--unverified` only, and
results then name the digest of what was taken.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ldm_jax.errors import InputError
from ldm_jax.files import digest, sha256


class Published(NamedTuple):
    file: str  # its name where we keep it
    sha256: str  # "" = unknown
    url: str


VGG16 = Published(
    "vgg16-397923af.pth",  # torchvision, trained on ImageNet
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
)
HUB = "https://huggingface.co"
PUBLISHED = {
    "lpips": (
        VGG16,
        Published(
            "vgg.pth",  # LPIPS v0.1, md5 d507d7349b931f0638a25a48a722f98a
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
            "v0.1/vgg.pth",
        ),
    ),
    "inception": (
        Published(
            "pt_inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
        ),
    ),
    "vgg16": (VGG16,),
    "clip-vit-b32": (
        Published(
            "clip-vit-base-patch32.bin",
            "",
            f"{HUB}/openai/clip-vit-base-patch32/resolve/main/pytorch_model.bin",
        ),
    ),
    "clip-vit-l14-336": (
        Published(
            "clip-vit-large-patch14-336.bin",
            "",
            f"{HUB}/openai/clip-vit-large-patch14-336/resolve/main/pytorch_model.bin",
        ),
    ),
    "dinov2-vitl14": (
        Published(
            "dinov2-large.safetensors",
            "",
            f"{HUB}/facebook/dinov2-large/resolve/main/model.safetensors",
        ),
    ),
}


def joined(digests: Iterable[str]) -> str:
    """One digest for a network that comes in several files; that of one file is its own."""
    ordered = sorted(digests)
    return ordered[0] if len(ordered) == 1 else digest("".join(ordered))


def is_published(name: str, digests: Iterable[str]) -> bool:
    """Whether these are the network's published files, all of them and no other."""
    known = sorted(published.sha256 for published in PUBLISHED[name])
    return "" not in known and sorted(digests) == known


def check_known(name: str) -> None:
    """Raises InputError where the digest of a published file is unknown."""
    for published in PUBLISHED[name]:
        if not published.sha256:
            raise InputError(
                f"the sha256 of {published.url} is not known here, so no file can be checked "
                "against it; add --unverified to take it as it comes: its digest is recorded, and "
                "results name it"
            )


def check(name: str, paths: Iterable[Path]) -> None:
    """Raises InputError for the first file that is none of the network's published ones."""
    check_known(name)
    for path in paths:
        found = sha256(path)
        if found not in {published.sha256 for published in PUBLISHED[name]}:
            files = ", ".join(f"{p.file} ({p.sha256[:8]})" for p in PUBLISHED[name])
            raise InputError(
                f"{path} has the sha256 {found[:8]}..; the published files of {name} are {files}: "
                "fetch it again, or add --unverified to convert other weights of the same shapes"
            )
