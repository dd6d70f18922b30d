"""The order in which a run draws samples from several corpora, with correct shares in every prefix of the run.

The first n samples contain ``w[i] * n`` samples of corpus i, rounded up or down, for every n and i. Drawing from the corpus
with the largest deficit does not guarantee that: with weights 1, 1, 1, 1, 60, 1, 45, 45 one corpus is 1.19 samples off.
Earliest deadline first does (Steiner and Yeomans, "Level Schedules for Mixed-Model, Just-in-Time Processes", Management
Science 39, 1993). Weights are ratios of whole numbers, so the order is periodic and only one period is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["Blend"]

_LONGEST_PERIOD = 2**16


class Blend:
    """The order of samples for positive ``weights``; samples are numbered from 0.

    Weights are exact if their period is at most 65,536 samples, as for weights with four decimals that add up to 1. Others
    are rounded to multiples of 1/65,536. Raises ConfigError if one is rounded to 0. ``shares`` (corpora,) are the samples
    of each corpus in a period of ``period`` samples.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = _shares(weights)
        self.period = sum(self.shares)
        order = np.array(_earliest_deadlines(self.shares), dtype=np.int64)
        self._slots = [np.flatnonzero(order == corpus) for corpus in range(len(self.shares))]
        self._corpus = order
        self._before = np.empty(self.period, dtype=np.int64)  # samples of the same corpus earlier in the period
        for slots in self._slots:
            self._before[slots] = np.arange(len(slots))

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """Return the corpus of each sample, and its index among the samples of that corpus, from 0."""
        turn, slot = np.divmod(samples, self.period)
        corpus = self._corpus[slot]
        return corpus, turn * np.asarray(self.shares)[corpus] + self._before[slot]

    def count(self, corpus: int, samples: int | IntArray) -> IntArray:
        """Return the number of samples of ``corpus`` among the first ``samples`` samples."""
        turns, rest = np.divmod(samples, self.period)
        return turns * self.shares[corpus] + np.searchsorted(self._slots[corpus], rest, side="left")


def _shares(weights: Sequence[float]) -> list[int]:
    """Return the smallest whole numbers with the ratios of ``weights``: 7 and 3 for 0.7 and 0.3."""
    exact = [Fraction(str(weight)) for weight in weights]  # the decimals as written: 0.1 is 1/10
    unit = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * unit) for weight in exact]
    common = math.gcd(*whole)
    if sum(whole) // common <= _LONGEST_PERIOD:
        return [share // common for share in whole]
    rounded = [round(Fraction(share * _LONGEST_PERIOD, sum(whole))) for share in whole]
    if 0 in rounded:
        least = weights[rounded.index(0)]
        raise ConfigError(
            f"data.train: weight {least} is less than one of {_LONGEST_PERIOD} samples; raise it or remove its corpus"
        )
    return rounded


def _earliest_deadlines(shares: Sequence[int]) -> list[int]:
    """Return the corpus of each sample of a period: among corpora that are not ahead, the one with the earliest deadline."""
    # Shares 7 and 3: the deadline of sample j of a corpus is ceil(10 j / share), so 2, 3, 5, 6, 8, 9, 10 and 4, 7, 10.
    # A corpus is ahead if it already has its share of the samples up to this one. The order is 0010010001.
    period, given, order = sum(shares), [0] * len(shares), []
    for number in range(1, period + 1):
        due = [corpus for corpus, share in enumerate(shares) if given[corpus] * period < number * share]
        order.append(min(due, key=lambda corpus: -(-(given[corpus] + 1) * period // shares[corpus])))
        given[order[-1]] += 1
    return order
