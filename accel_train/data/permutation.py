"""The order of the training data as a pure function of (seed, epoch, position).

The sample at position i of epoch e is computed in constant time and memory. So resuming at any
step costs the same as starting, and the order does not depend on the number of processes. The
price is about fifty nanoseconds of arithmetic per sample, where a stored permutation costs one read.

The data fingerprint proves which samples were consumed at which positions; the parts of several
ranks add up to the same number.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
"""Sample ids."""

ROUNDS = 6
"""Four Feistel rounds make a strong pseudorandom permutation (Luby and Rackoff 1988); two more are margin."""

MAX_SAMPLES = 2**62
"""Each half of a position must fit into 32 bits."""

_GAMMA = 0x9E3779B97F4A7C15
_BLOCK_POSITIONS = 4096
"""Positions computed at a time: about 0.2 ms, beside which numpy's cost per call is negligible."""


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood 2014) in place."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _mix_int(word: int) -> int:
    return int(_mix(np.array([word % 2**64], dtype=np.uint64))[0])


def order_key(seed: int, epoch: int) -> int:
    """Return the 64-bit key of the permutation of epoch ``epoch`` (from 0)."""
    return _mix_int(_mix_int(seed + _GAMMA) + _GAMMA * (epoch + 1))


class Permutation:
    """A keyed pseudorandom permutation of ``range(n)``.

    A generalized Feistel network over pairs of digits in base ``ceil(sqrt(n))``, with cycle
    walking for the few values at or above ``n`` (Black and Rogaway 2002, method 3). The
    domain is at most ``2 * sqrt(n)`` larger than ``n``, so walking is rare; a domain of an even
    number of bits would be up to four times as large as ``n``.

    Args:
        n: number of elements, from 1 to 2**62.
        key: 64-bit key, see :func:`order_key`.

    Raises:
        ValueError: ``n`` is out of range.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= MAX_SAMPLES:
            raise ValueError(f"a permutation needs 1 to 2**62 elements, not {n}")
        self.n = n
        self._base = np.uint64(isqrt(n - 1) + 1)
        self._round_keys = [np.uint64(_mix_int(key + _GAMMA * i)) for i in range(1, ROUNDS + 1)]

    def __call__(self, positions: npt.ArrayLike) -> Ids:
        """Return the elements at ``positions``.

        Args:
            positions: integers in ``[0, n)``, of any shape.

        Returns:
            int64 array of the shape of ``positions``.

        Raises:
            IndexError: a position is outside ``[0, n)``.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n):
            raise IndexError(f"positions must lie in [0, {self.n}), not [{wanted.min()}, {wanted.max()}]")
        ids = self._encrypt(wanted.astype(np.uint64).ravel())
        while (outside := np.flatnonzero(ids >= self.n)).size:
            ids[outside] = self._encrypt(ids[outside])
        return ids.astype(np.int64).reshape(wanted.shape)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        base = self._base
        left, right = np.divmod(values, base)
        for key in self._round_keys:
            # The upper half of the word, scaled to the base, is far cheaper than a remainder.
            moved = left + ((_mix(right ^ key) >> np.uint64(32)) * base >> np.uint64(32))
            left, right = right, np.minimum(moved, moved - base)  # modulo base: an underflow is huge
        return left * base + right


class GlobalBatchSampler:
    """Global micro-batches of sample ids, for a DataLoader that Accelerate splits over the ranks.

    Use it as the ``batch_sampler`` of a DataLoader with ``DataLoaderConfiguration(split_batches=True)``:
    every rank iterates over the same global batches and takes its contiguous slice. Only :meth:`seek`
    sets the start. There is no ``sampler`` and no ``set_epoch``, because Accelerate would call them
    with an epoch counted from 0 in every process. Iterating has no side effect: every ``iter()``
    starts where the last seek points and ends with that epoch.

    ``len()`` is always that of a whole epoch. DataLoader and Accelerate end an epoch when the
    iterator ends and use the length for display only, so a resumed epoch needs no other value.

    Args:
        num_samples: size of the dataset.
        batch_size: samples per micro-step over all ranks.
        seed: seed of the order.
        batches_per_epoch: batches in an epoch; default ``num_samples // batch_size``. With
            gradient accumulation pass the micro-steps of the epoch's whole steps.

    Raises:
        ValueError: the dataset does not fill the batches of one epoch.
    """

    drop_last = True

    def __init__(self, num_samples: int, batch_size: int, seed: int, batches_per_epoch: int | None = None) -> None:
        fitting = num_samples // batch_size
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.batches_per_epoch = fitting if batches_per_epoch is None else batches_per_epoch
        if not 1 <= self.batches_per_epoch <= fitting:
            raise ValueError(
                f"a dataset of {num_samples} samples holds {fitting} batches of {batch_size}, "
                f"so an epoch cannot have {self.batches_per_epoch}"
            )
        self.epoch = self.batch = 0

    def seek(self, epoch: int, batch: int) -> None:
        """Make every ``iter()`` start at ``batch`` (micro-steps from 0) of ``epoch`` (from 0), in constant time.

        Raises:
            ValueError: the epoch has no such batch; ``batch == len(self)`` is its end and gives no batches.
        """
        if epoch < 0 or not 0 <= batch <= self.batches_per_epoch:
            raise ValueError(f"no batch {batch} of epoch {epoch}: an epoch has {self.batches_per_epoch} batches")
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Ids]:
        permutation = Permutation(self.num_samples, order_key(self.seed, self.epoch))
        end = self.batches_per_epoch * self.batch_size
        block = max(1, _BLOCK_POSITIONS // self.batch_size) * self.batch_size
        for start in range(self.batch * self.batch_size, end, block):
            ids = permutation(np.arange(start, min(start + block, end)))
            yield from ids.reshape(-1, self.batch_size)


def fingerprint_terms(positions: npt.ArrayLike, ids: npt.ArrayLike) -> int:
    """Return what these samples add to the data fingerprint: the sum modulo 2**64 of a hash of each (position, id).

    The sums of any partition of the same pairs add up (modulo 2**64) to the same number, so the
    fingerprint does not depend on the number of ranks. A sample that is swapped, left out, doubled
    or taken from another position changes it.

    Args:
        positions: integers, the position of each sample in the whole run, counted over epochs.
        ids: integers of the same shape, the id of the sample consumed at each position.

    Returns:
        An integer in ``[0, 2**64)``.
    """
    words = _mix(np.asarray(positions, dtype=np.uint64) + np.uint64(_GAMMA)) ^ np.asarray(ids).astype(np.uint64)
    return int(_mix(words * np.uint64(_GAMMA)).sum(dtype=np.uint64))
