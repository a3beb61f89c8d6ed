"""Random draws of the host: each a pure function of (seed, purpose, position).

The counterpart of `keys.py` for numpy. Only raw Philox words are used: numpy promises them to stay
the same for ever, which it does not promise for its distributions or its `permutation`.
"""

from zlib import crc32

import numpy as np

_BLOCK = 256  # neighbouring positions share one generator, as making one costs 10 us


def words(seed: int, purpose: str, stream: tuple[int, int], count: int) -> np.ndarray:
    """`count` uint64 words of the stream named by (seed, purpose, stream)."""
    key = [seed & 0xFFFFFFFFFFFFFFFF, crc32(purpose.encode())]
    counter = np.array([0, 0, *stream], np.uint64)  # the low two words count inside the stream
    return np.random.Philox(key=np.array(key, np.uint64), counter=counter).random_raw(count)


def uniforms(seed: int, purpose: str, positions: np.ndarray, count: int = 1) -> np.ndarray:
    """f64 [b, count] in [0, 1): row i depends on positions[i] and on nothing else in the batch."""
    positions = np.asarray(positions, np.int64)
    blocks, slots = positions // _BLOCK, positions % _BLOCK
    out = np.empty((len(positions), count))
    for block in np.unique(blocks):
        table = words(seed, purpose, (int(block), 0), _BLOCK * count).reshape(_BLOCK, count)
        rows = blocks == block
        out[rows] = (table[slots[rows]] >> np.uint64(11)) * 2.0**-53
    return out


def permutation(seed: int, purpose: str, stream: tuple[int, int], n: int) -> np.ndarray:
    """A permutation of range(n), in the smallest unsigned type that holds it."""
    small = np.uint32 if n <= 1 << 32 else np.uint64
    return np.argsort(words(seed, purpose, stream, n), kind="stable").astype(small)
