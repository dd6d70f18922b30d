"""Find where documents begin in the rows of a run, from the index of each corpus. Needs no torch.

The token that ends a document is a target of that document, and the input that predicts the first token of the next one. It
is the same for all documents, so a row cut in front of its end tokens into parts loses no target and leaks no text: with
end token ``e``, the row ``a1 a2 e b1`` has the parts ``a1 a2`` and ``e b1``, with the targets ``a2 e`` and ``b1 b2``.

Shapes: n samples of T tokens, R rows of S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.sample_stream import TokenSpans
from seqlen_curriculum.data.samples import Samples, TokenRanges
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["DocumentRows", "document_rows", "rows_of_samples"]


class DocumentRows:
    """The parts of rows (R, S): each part has inputs from one document that are neighbours in their corpus."""

    def __init__(self, first_targets: NDArray[np.bool_], joints: NDArray[np.bool_]) -> None:
        self.first_targets = first_targets
        """(R, S), True at each input whose target is the first token of a document."""
        self._joints = joints  # (R, S), True where leftovers begin whose input before them isn't from the same place

    def __getitem__(self, rows: slice) -> DocumentRows:
        return DocumentRows(self.first_targets[rows], self._joints[rows])

    @property
    def num_first_targets(self) -> int:
        """The number of targets that are the first token of a document."""
        return int(np.count_nonzero(self.first_targets))

    def starts(self) -> NDArray[np.bool_]:
        """Return (R, S), True at the first input of each part."""
        starts: NDArray[np.bool_] = self.first_targets | self._joints
        starts[:, :1] = True
        return starts


def document_rows(
    spans: Iterable[tuple[TokenRanges, TokenSpans]], samples: int, tokens: int, row_tokens: int
) -> DocumentRows:
    """Return the parts of ``samples`` samples of ``tokens`` tokens, cut into rows of ``row_tokens``.

    ``spans`` are the origin of all tokens of the samples, for each of their sources.
    """
    first_targets, joints = np.zeros((2, samples, tokens), dtype=bool)
    for source, of_source in spans:
        joints[of_source.row, of_source.column] = True
        _mark(first_targets, source.ranges, of_source)
    return DocumentRows(first_targets.reshape(-1, row_tokens), joints.reshape(-1, row_tokens))


def rows_of_samples(samples: Samples, ids: IntArray) -> DocumentRows:
    """Return the parts of whole samples ``ids`` (n,), one row each."""
    zero, tokens = np.zeros_like(ids), samples.seq_length
    spans = TokenSpans(np.arange(len(ids)), zero, zero + tokens, *samples.locate(ids))
    return document_rows([(samples, spans)], len(ids), tokens, tokens)


def _mark(marks: NDArray[np.bool_], ranges: Sequence[tuple[IndexedCorpus, int, int]], spans: TokenSpans) -> None:
    """Set ``marks`` (n, T) at each input of ``spans`` whose target is the first token of a document."""
    for index in np.unique(spans.range_index).tolist():
        corpus, chosen = ranges[index][0], spans.range_index == index
        row, column, length, start = (part[chosen] for part in (spans.row, spans.column, spans.length, spans.start))
        # The targets of inputs [start, start + length) are tokens [start + 1, start + length + 1).
        first, end = corpus.first_documents_from(np.stack([start, start + length]) + 1)
        # One entry per document: from spans with documents 4 to 7 and 9 to 10 (ends excluded) come 4 5 6 9.
        owner = np.repeat(np.arange(len(row)), end - first)
        document = np.arange(len(owner)) + np.repeat(first - np.cumsum(end - first) + (end - first), end - first)
        marks[row[owner], column[owner] + corpus.starts_of(document) - 1 - start[owner]] = True
