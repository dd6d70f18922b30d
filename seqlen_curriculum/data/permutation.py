"""The order of an epoch: a keyed permutation computed per index, without shuffling or storing an array.

An index in ``range(size)`` is a pair in Z_a x Z_b with a = ceil(sqrt(size)), b = ceil(size / a). A Feistel round adds a
hash of one half to the other. Each round is invertible, so the result is a bijection of range(a * b), with a * b < size + a.
Values at or above ``size`` are permuted again (cycle walking), which gives a bijection of ``range(size)``.
Reference: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["permute"]

_ROUNDS = 6  # each mixes both halves; with 6 or more all 120 orders of 5 items are equally frequent, with 4 not
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_MASK = 2**64 - 1
_WORTH_A_TABLE = 64  # a table of up to 64 entries per index pays off, because every batch reuses it


def permute(index: ArrayLike, size: int, seed: int, epoch: ArrayLike = 0) -> IntArray:
    """Return the image of each ``index`` under the permutation of ``range(size)`` keyed by ``seed`` and ``epoch``.

    ``index`` is an integer or an array in ``0..size - 1``. ``epoch`` (0 or more) is a scalar or one value per index.
    Returns int64 of their common shape. Raises ``IndexError`` outside the range, ``ValueError`` for ``size`` below 1.
    """
    indices, epochs = np.broadcast_arrays(np.asarray(index, dtype=np.int64), np.asarray(epoch, dtype=np.int64))
    if not 1 <= size < 2**62:
        raise ValueError(f"size must be 1 or more, not {size}")
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        raise IndexError(f"index {indices.min()}..{indices.max()} is outside 0..{size - 1}")
    if epochs.size and epochs.min() < 0:
        raise IndexError(f"epoch must be 0 or more, not {epochs.min()}")
    keys = _mix((epochs.astype(np.uint64).reshape(-1) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(seed & _MASK))
    if (keys == keys[:1]).all():
        keys = keys[:1]  # one epoch, as in nearly every batch
    place = _feistel(indices.reshape(-1), size, keys)
    # Cycle walking: size 10 gives a = 4 and b = 3, so values 10 and 11 are permuted again until they are below 10.
    outside = np.flatnonzero(place >= size)
    while outside.size:
        place[outside] = _feistel(place[outside], size, keys if len(keys) == 1 else keys[outside])
        outside = outside[place[outside] >= size]
    return place.reshape(indices.shape)


def _feistel(index: IntArray, size: int, keys: NDArray[np.uint64]) -> IntArray:
    """Permute Z_a x Z_b; (n,) -> (n,), ``keys`` (n,) or (1,)."""
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    left, right = np.divmod(index, b)
    # Both terms are below the modulus, so subtracting it at most once gives the remainder without a division.
    for number in range(0, 2 * _ROUNDS, 2):
        left += _round(right, b, a, keys, number)
        np.subtract(left, a, out=left, where=left >= a)
        right += _round(left, a, b, keys, number + 1)
        np.subtract(right, b, out=right, where=right >= b)
    left *= b
    left += right
    return left


def _round(half: IntArray, values: int, modulus: int, keys: NDArray[np.uint64], number: int) -> IntArray:
    """Return the term below ``values`` that a round adds for each ``half``, from a table of all halves if that is small."""
    if len(keys) == 1 and values <= _WORTH_A_TABLE * len(half):
        return np.take(_table(values, modulus, int(keys[0]), number), half)
    return _hash(half, modulus, keys, number)


@lru_cache(maxsize=8 * _ROUNDS)  # four epochs, for example of four corpora
def _table(values: int, modulus: int, key: int, number: int) -> IntArray:
    return _hash(np.arange(values, dtype=np.int64), modulus, np.array([key], dtype=np.uint64), number)


def _hash(half: IntArray, modulus: int, keys: NDArray[np.uint64], number: int) -> IntArray:
    """Return 64 bits keyed by epoch and round, modulo ``modulus``."""
    # The round's key is hashed before the half is added. Otherwise one round would equal another shifted by one.
    keyed = half.astype(np.uint64) + _mix(keys + np.uint64((number + 1) * _GOLDEN & _MASK))
    return (_mix(keyed) % np.uint64(modulus)).astype(np.int64)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
