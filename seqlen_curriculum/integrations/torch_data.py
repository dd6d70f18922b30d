"""The data of a run for any loop that reads a torch ``DataLoader``, and a user's own loader at the step's length.

Item *i* of ``RunRows`` is the run's *i*-th sample, already at the length of its step. Which step that is follows from *i*,
so workers, prefetching, samplers and skipped batches on resume can't mix lengths.

Shapes: K segments per sample (1 where samples are truncated), s the step's seqlen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from seqlen_curriculum.batch import set_batch_sequence_length
from seqlen_curriculum.data.from_config import open_samples, open_training_data
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.integrations.plan import TrainerPlan

__all__ = ["EvaluationRows", "RunLoader", "RunRows", "RunSampler", "lengthen"]


class RunRows(Dataset[dict[str, Tensor]]):
    """The samples of a run in the order in which ``train_gpt2.py`` reads them, each at the length of its step.

    An item has ``input_ids``, ``labels`` and ``shift_labels``, (s,) int64 each; with ``method: "segment"`` (K, s).
    ``labels`` are already shifted: label *i* is the token after input *i*, so that all s of them are targets.
    ``shift_labels`` is the same tensor under the name by which Hugging Face's models take shifted labels as they are.

    Read it in order, in steps of ``plan.global_batch`` items (``RunSampler``, ``RunLoader``). Can be pickled: each worker
    opens the corpora by itself.
    """

    def __init__(self, plan: TrainerPlan) -> None:
        """Open the corpora of the plan's ``data`` section. Raises ConfigError without one, DataError."""
        if plan.config.data is None:
            raise ConfigError("data: section required, but not given; RunRows reads its corpora")
        self.plan = plan
        self._data = open_training_data(plan.config)

    def __len__(self) -> int:
        """Return the samples of the whole run, every repetition of the corpus counted."""
        return self.plan.timeline.consumed_samples(self.plan.steps)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return sample ``index`` (0-based) of the run."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several samples; torch's ``DataLoader`` reads a batch this way. Neighbours are read together."""
        bad = [index for index in indices if not 0 <= index < len(self)]
        if bad:
            raise IndexError(f"sample {bad[0]} is outside the {len(self)} of the run")
        return [item for step, first, count in self._runs(indices) for item in self._read(step, first, count)]

    def _runs(self, indices: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield (step, first sample in the step, count) for each run of neighbours within a step."""
        batch, start = self.plan.global_batch, 0
        for end in range(1, len(indices) + 1):
            joins = end < len(indices) and indices[end] == indices[end - 1] + 1 and indices[end] % batch
            if not joins:
                yield indices[start] // batch + 1, indices[start] % batch, end - start
                start = end

    def _read(self, step: int, first: int, count: int) -> Iterator[dict[str, Tensor]]:
        inputs, targets = (torch.from_numpy(part.astype(np.int64)) for part in self._data.read(step, first, count))
        segments = len(inputs) // count
        for row in range(0, len(inputs), segments):
            rows = slice(row, row + segments) if segments > 1 else row
            yield {"input_ids": inputs[rows], "labels": targets[rows], "shift_labels": targets[rows]}

    @staticmethod
    def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return items of one length as a batch, (rows, s) each: a ``collate_fn`` that also joins segments."""
        return {key: torch.cat([item[key].reshape(-1, item[key].shape[-1]) for item in items]) for key in items[0]}


class EvaluationRows(Dataset[dict[str, Tensor]]):
    """The validation rows on which ``train_gpt2.py`` evaluates: ``training.eval_rows`` of full length, evenly chosen.

    Items as those of ``RunRows``, (S,) each.
    """

    def __init__(self, plan: TrainerPlan) -> None:
        """Open the validation split of the plan's ``data`` section. Raises ConfigError without one, DataError."""
        if plan.config.data is None or plan.config.training is None:
            raise ConfigError("data: section required, but not given; EvaluationRows reads its validation split")
        self._samples = open_samples(plan.config, "valid")
        rows = min(plan.config.training.eval_rows, self._samples.num_samples)
        self._ids = np.arange(rows, dtype=np.int64) * self._samples.num_samples // rows

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self._samples.read(self._ids[[index]], self._samples.seq_length)[0].astype(np.int64))
        return {"input_ids": tokens[:-1], "labels": tokens[1:], "shift_labels": tokens[1:]}


class RunSampler(DistributedSampler[int]):
    """The items of ``RunRows`` that a rank reads, in order.

    A ``DistributedSampler``, because trainers such as Lightning replace every other sampler on several ranks.

    A step's ``global_batch`` items are dealt out in micro-batches: number *m* of rank *r* of *n* has the items from
    ``(m * n + r) * micro_batch`` on, as Accelerate deals batches out. ``first_step`` is the first step to read.
    """

    def __init__(self, rows: RunRows, micro_batch: int, *, rank: int = 0, ranks: int = 1, first_step: int = 1) -> None:
        """Raises ConfigError where ``micro_batch`` rows on each of ``ranks`` don't divide the global batch."""
        batch = rows.plan.global_batch
        if micro_batch < 1 or ranks < 1 or batch % (micro_batch * ranks):
            raise ConfigError(
                f"micro_batch: {micro_batch} rows on each of {ranks} ranks don't divide the global batch of {batch}; choose "
                "a micro-batch that does"
            )
        super().__init__(rows, num_replicas=ranks, rank=rank, shuffle=False)
        self._length, self._micro_batch = len(rows), micro_batch
        self._rank, self._ranks = rank, ranks
        self._micro_batches = batch // (micro_batch * ranks)
        self.first_micro_batch = (first_step - 1) * self._micro_batches
        """Micro-batches of this rank to leave out, counted from the run's first step."""

    def __len__(self) -> int:
        """Return how many items this rank reads from the first step on."""
        return self._length // self._ranks - self.first_micro_batch * self._micro_batch

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this rank's items."""
        # 8 rows, 2 ranks, micro-batches of 2: rank 1 reads items 2 3, 6 7 of step 1, then 10 11, 14 15 of step 2.
        stride = self._micro_batch * self._ranks
        begin = self.first_micro_batch * stride + self._rank * self._micro_batch
        for start in range(begin, self._length, stride):
            yield from range(start, start + self._micro_batch)


class RunLoader(DataLoader[dict[str, Tensor]]):
    """A ``DataLoader`` over ``RunRows`` that gives a rank its micro-batches in order, and can resume mid-step.

    ``state_dict`` counts the samples handed out, not those that workers have prefetched. It can be loaded on another number
    of ranks and with other micro-batches.
    """

    def __init__(
        self, rows: RunRows, micro_batch: int, *, rank: int = 0, ranks: int = 1, first_step: int = 1, **options: Any
    ) -> None:
        """Set up the loader; ``options`` go to ``DataLoader``. Raises ConfigError as ``RunSampler`` does."""
        sampler = RunSampler(rows, micro_batch, rank=rank, ranks=ranks, first_step=first_step)
        super().__init__(rows, micro_batch, sampler=sampler, collate_fn=RunRows.collate, **options)
        self._sampler = sampler
        self._handed_out = sampler.first_micro_batch
        self._samples = micro_batch * ranks  # of one micro-batch over all ranks
        self._micro_batches = len(rows) // self._samples

    def __len__(self) -> int:
        """Return the micro-batches of this rank in the whole run, also after a resume, as trainers count them."""
        return self._micro_batches

    def __iter__(self) -> Any:
        """Yield the micro-batches from the first step, or from the loaded state, to the end of the run."""
        self._handed_out = self._sampler.first_micro_batch
        for micro_batch in super().__iter__():
            self._handed_out += 1
            yield micro_batch

    def state_dict(self) -> dict[str, int]:
        """Return how many samples of the run have been handed out on all ranks together."""
        return {"samples": self._handed_out * self._samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin after ``state``. Raises CheckpointError if that is within a micro-batch."""
        handed_out, rest = divmod(state["samples"], self._samples)
        if rest:
            raise CheckpointError(
                f"the loader's state is after {state['samples']} samples, which is within a micro-batch of {self._samples} "
                "over all ranks; resume at the end of a step"
            )
        self._sampler.first_micro_batch = self._handed_out = handed_out


def lengthen(
    loader: Iterable[Any], plan: TrainerPlan, micro_batches: int, *, first_step: int = 1, labels_shifted: bool = False
) -> Iterator[Any]:
    """Yield the batches of a user's own full-length loader, each cut to the length of its step.

    ``micro_batches`` is how many batches a rank reads per optimizer step (gradient accumulation), ``first_step`` the step
    of the first batch. Iterate over the result where batches are used: behind the loader's workers and its prefetching.
    ``labels_shifted`` as in ``set_batch_sequence_length``. With ``method: "segment"`` a row becomes its segments. Ends with
    the run or the loader.
    """
    truncate = plan.config.shortening.method != "segment"
    for number, batch in enumerate(loader):
        step = first_step + number // micro_batches
        if step > plan.steps:
            return
        yield set_batch_sequence_length(batch, plan.seqlen(step), truncate, labels_shifted=labels_shifted)[0]
