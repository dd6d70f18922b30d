"""The parts of documents in the micro-batches of a run whose attention stops at document ends.

Shapes: ``B`` rows, ``S`` seqlen.
"""

from __future__ import annotations

import numpy as np
import torch

from seqlen_curriculum.config.plan import RunPlan
from seqlen_curriculum.data.documents import DocumentRows, rows_of_samples
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.models.document_attention import DocumentParts
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["parts_of_samples", "parts_of_step", "two_parts"]


def parts_of_step(
    documents: DocumentRows, micro_rows: int, plan: RunPlan, step: int, device: torch.device
) -> list[DocumentParts]:
    """Return the parts of each micro-batch of ``micro_rows`` rows of a rank, whose rows of ``step`` are ``documents``.

    With ``method: "window"`` the step's windows cut them further.
    """
    window = plan.timeline.seqlen(step) if plan.shortening.method == "window" else None
    restart, starts = plan.scheduler.config.restart_positions, documents.starts()
    return [
        DocumentParts.of(starts[row : row + micro_rows], window, restart).to(device)
        for row in range(0, len(starts), micro_rows)
    ]


def parts_of_samples(samples: Samples, ids: IntArray, device: torch.device) -> DocumentParts:
    """Return the parts of whole samples ``ids``, for an evaluation."""
    return DocumentParts.of(rows_of_samples(samples, ids).starts()).to(device)


def two_parts(rows: int, seqlen: int, device: torch.device) -> DocumentParts:
    """Return the parts of rows of two documents each, which take more memory than whole rows: they are copied and padded."""
    starts = np.zeros((rows, seqlen), dtype=bool)
    starts[:, [0, seqlen // 2]] = True
    return DocumentParts.of(starts).to(device)
