"""placeholder until merge"""

from ldm_jax.errors import InputError


def load(name: str, file: str = ""):
    raise InputError(f"{name} weights are missing")
