"""The parts of documents in the micro-batches of a run whose attention stops at document ends.

Shapes: ``B`` rows, ``S`` seqlen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from seqlen_curriculum.config.plan import RunPlan
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.documents import DocumentRows, rows_of_samples
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.models.document_attention import DocumentParts
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["DocumentBatches"]


@dataclass(frozen=True)
class DocumentBatches:
    """The parts of documents that the model's forward gets with each micro-batch."""

    mask_first_targets: bool
    """``data.eod_mask_loss``: the first token of a document is not a target."""

    @classmethod
    def of(cls, config: RunConfig) -> DocumentBatches | None:
        """Return None for a run whose tokens attend through their row."""
        assert config.data is not None
        return cls(config.data.eod_mask_loss) if config.stops_at_documents else None

    @property
    def facts(self) -> dict[str, Any]:
        """Return the additional values of an evaluation's record in the run log."""
        return {"attention": "document"} | ({"eod_mask_loss": True} if self.mask_first_targets else {})

    def of_step(
        self, documents: DocumentRows, own: slice, micro_rows: int, plan: RunPlan, step: int, device: torch.device
    ) -> list[DocumentParts]:
        """Return the parts of each micro-batch of ``micro_rows`` rows; this rank has the rows ``own`` of ``documents``.

        With ``method: "window"`` the step's windows cut them further.
        """
        window = plan.timeline.seqlen(step) if plan.shortening.method == "window" else None
        restart = plan.scheduler.config.restart_positions
        starts, kept = documents.starts()[own], self._kept(documents)
        found = []
        for first in range(0, len(starts), micro_rows):
            rows = slice(first, first + micro_rows)
            parts = DocumentParts.of(starts[rows], window, restart)
            if kept is not None:
                parts = parts.keeping(kept[own][rows], np.count_nonzero(kept) * micro_rows / len(kept))
            found.append(parts.to(device))
        return found

    def of_samples(self, samples: Samples, all_ids: IntArray, ids: IntArray, device: torch.device) -> DocumentParts:
        """Return the parts of whole samples ``ids``, of an evaluation on ``all_ids``."""
        documents = rows_of_samples(samples, ids)
        parts, kept = DocumentParts.of(documents.starts()), self._kept(documents)
        if kept is not None:
            total = all_ids.size * samples.seq_length - rows_of_samples(samples, all_ids).num_first_targets
            parts = parts.keeping(kept, total * len(ids) / len(all_ids))
        return parts.to(device)

    def largest(self, rows: int, seqlen: int, device: torch.device) -> DocumentParts:
        """Return parts that take more memory than whole rows: four per row, most of them padded by a quarter."""
        starts = np.zeros((rows, seqlen), dtype=bool)
        starts[:, :: seqlen // 4 + 1] = True
        parts = DocumentParts.of(starts)
        if self.mask_first_targets:
            parts = parts.keeping(~starts, float(np.count_nonzero(~starts)))
        return parts.to(device)

    def _kept(self, documents: DocumentRows) -> Any:
        """Return (B, S), True at the targets that count, or None if all do."""
        return ~documents.first_targets if self.mask_first_targets else None
