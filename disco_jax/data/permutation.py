"""Keyed pseudorandom permutations of `[0, length)` in closed form, for arrays of places.

Grain's `index_shuffle` permutes one index per call and walks through at least 2**16 values, which
takes milliseconds for a length of 8. Here the work does not depend on the length.
"""

import numpy as np

ROUNDS = 8  # even, so that the halves of an odd number of bits have their widths back at the end
_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, as in SplitMix64


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """Returns a key, uint64 `[n]`, that depends on all `parts`, each an integer or int64 `[n]`."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mixed((key + _STEP) ^ np.atleast_1d(part).astype(np.uint64))
    return key


def permuted(index: np.ndarray, length: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns where the permutation of `[0, length)` with this key takes each index.

    A Feistel network permutes the smallest power of two that is not below the length and 16, and is
    repeated for results that lie outside (cycle walking: Black and Rogaway, 2002).

    Args:
      index: int64 `[n]`, each at least 0 and less than its length.
      length: at least 1 and at most 2**52; an integer, or int64 `[n]`.
      key: uint64 `[n]` or `[1]` (`key_of`).

    Returns:
      int64 `[n]`.
    """
    x, end, key = np.broadcast_arrays(index.astype(np.uint64), np.uint64(length), key)
    bits = np.maximum(np.frexp((end - np.uint64(1)).astype(np.float64))[1], 4).astype(np.uint64)
    x = _feistel(x, bits, key)
    while (outside := np.flatnonzero(x >= end)).size:
        x[outside] = _feistel(x[outside], bits[outside], key[outside])
    return x.astype(np.int64)


def _feistel(x: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permutes integers of `bits` bits: in each round, one half is XORed with a hash of the other.

    The halves then change places.
    """
    one = np.uint64(1)
    low = bits >> one
    high = bits - low
    for _ in range(ROUNDS):
        key = key + _STEP
        right = x & ((one << low) - one)
        left = (x >> low) ^ (_mixed(key ^ right) & ((one << high) - one))
        x = (right << high) | left
        low, high = high, low
    return x


def _mixed(x: np.ndarray) -> np.ndarray:
    """Hashes uint64 `[n]` one to one: the last step of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
