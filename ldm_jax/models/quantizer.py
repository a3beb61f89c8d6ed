"""Vector quantisation: the codebook of a VQ first stage, its loss, its use, and its upkeep.

The codebook is trained by gradient as published (van den Oord et al., NeurIPS 2017; as LDM's VQ
models use it), or as a moving average of the latents it stands for; codes that fall out of use can
be put back among the latents. Indices are int32 [B,h,w].
"""

import dataclasses

import jax
import jax.numpy as jnp

from ldm_jax.errors import within

AXES = (None, None)  # of the codebook [n,C], which every device holds whole
CHUNK = 1024  # codes whose distances are held at once: [B,h,w,CHUNK] f32


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    codebook_size: int = 8192  # number of codes; each starts uniform in +-1/codebook_size
    beta: float = 0.25
    legacy_beta: bool = True  # published: beta weighs the codebook's term; False: the commitment's
    average_decay: float = 0.0  # 0 = codebook by gradient; else a moving average of its latents
    restart_below: float = 0.0  # codes used less often a step than this start anew; 0 = never

    def __post_init__(self):
        within("codebook_size", self.codebook_size, "[2, inf)")
        for name in ("beta", "restart_below"):
            within(f"quantizer {name}", getattr(self, name), "[0, inf)")
        within("quantizer average_decay", self.average_decay, "[0, 1)")

    @property
    def keeps_counts(self) -> bool:
        """Whether training carries `start_counts` from step to step."""
        return self.average_decay > 0 or self.restart_below > 0


def nearest(codebook: jax.Array, z: jax.Array) -> jax.Array:
    """Indices [B,h,w] of the codes nearest to z [B,h,w,C]; of equals the first.

    codebook [n,C]. Distances are f32 and never held for more than CHUNK codes at a time.
    """
    n, c = codebook.shape
    size = min(n, CHUNK)
    chunks = jnp.pad(codebook, ((0, -n % size), (0, 0))).reshape(-1, size, c)
    starts = jnp.arange(0, chunks.shape[0] * size, size, dtype=jnp.int32)

    def closer(best, chunk):
        codes, start = chunk
        # |z - e|^2 without |z|^2, which is the same for every code.
        dot = jnp.einsum("bhwc,nc->bhwn", z, codes, precision=jax.lax.Precision.HIGHEST)
        number = start + jnp.arange(size, dtype=jnp.int32)
        square = jnp.where(number < n, jnp.square(codes).sum(-1), jnp.inf)
        distance = square.reshape(1, 1, 1, -1) - 2 * dot
        index = jnp.argmin(distance, -1).astype(jnp.int32)
        smallest = distance.min(-1)
        better = smallest < best[0]
        new = jnp.where(better, smallest, best[0]), jnp.where(better, start + index, best[1])
        return new, None

    shape = z.shape[:-1]
    best = jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32)
    if len(chunks) == 1:
        return closer(best, (chunks[0], starts[0]))[0][1]
    return jax.lax.scan(closer, best, (chunks, starts))[0][1]


def quantize(codebook: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """z [B,h,w,C] -> the nearest codes [B,h,w,C] and their indices; no straight-through."""
    indices = nearest(jax.lax.stop_gradient(codebook), jax.lax.stop_gradient(z))
    return codebook[indices], indices


def straight_through(z: jax.Array, z_q: jax.Array) -> jax.Array:
    """The value of z_q with the gradient of z."""
    return z + jax.lax.stop_gradient(z_q - z)


def loss(config: QuantizerConfig, z: jax.Array, z_q: jax.Array) -> jax.Array:
    """Codebook and commitment terms, *means* over all elements as published.

    With `legacy_beta` the commitment has weight 1 and the codebook beta, as in every released
    model; without, the other way round. A codebook that is a moving average has no term.
    """
    commitment = jnp.square(jax.lax.stop_gradient(z_q) - z).mean()
    codebook = jnp.square(z_q - jax.lax.stop_gradient(z)).mean()
    if config.average_decay:
        return (1.0 if config.legacy_beta else config.beta) * commitment
    if config.legacy_beta:
        return commitment + config.beta * codebook
    return config.beta * commitment + codebook


def usage(indices: jax.Array, codebook_size: int) -> dict[str, jax.Array]:
    """How a batch uses the codebook: perplexity (1..n) and the fraction of codes used at all."""
    counts = _counts(indices, codebook_size)
    p = counts / counts.sum()
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0))
    return {"perplexity": jnp.exp(entropy), "codes_used": (counts > 0).mean()}


def start_counts(codebook: jax.Array) -> dict[str, jax.Array]:
    """What the upkeep carries: moving averages of each code's count [n] and summed latents [n,C].

    Both start as if every code had been used once, for itself.
    """
    return {"count": jnp.ones(codebook.shape[:1]), "sum": codebook}


def upkeep(
    config: QuantizerConfig,
    codebook: jax.Array,
    carried: dict[str, jax.Array],
    z: jax.Array,
    indices: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """After a step: the codebook as a moving average, idle codes put on latents of the batch.

    z [B,h,w,C] are the batch's latents and indices [B,h,w] the codes that stood for them; `key`
    picks the latents for restarted codes. Without `average_decay`, counts have a decay of 0.99.
    """
    n, c = codebook.shape
    decay = config.average_decay or 0.99
    flat = z.reshape(-1, c)
    sums = jnp.zeros((n, c)).at[indices.reshape(-1)].add(flat)
    count = decay * carried["count"] + (1 - decay) * _counts(indices, n)
    total = decay * carried["sum"] + (1 - decay) * sums
    if config.average_decay:
        # A count near 0 would divide noise; Laplace smoothing as in Razavi et al. (2019).
        smooth = (count + 1e-5) / (count.sum() + n * 1e-5) * count.sum()
        codebook = total / smooth[:, None]
    if config.restart_below:
        idle = count < config.restart_below
        picked = flat[jax.random.randint(key, (n,), 0, flat.shape[0])]
        codebook = jnp.where(idle[:, None], picked, codebook)
        # A restarted code is given time: unused, it is idle again after log(2) / (1 - decay) steps.
        restarted = 2 * config.restart_below
        count = jnp.where(idle, restarted, count)
        total = jnp.where(idle[:, None], restarted * picked, total)
    return codebook, {"count": count, "sum": total}


def _counts(indices: jax.Array, size: int) -> jax.Array:
    return jnp.zeros(size, jnp.int32).at[indices.reshape(-1)].add(1).astype(jnp.float32)
