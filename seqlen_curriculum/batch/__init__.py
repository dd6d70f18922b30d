"""Shorten the full-length batches of a user's own loader to the step's sequence length."""

from seqlen_curriculum.batch.containers import iter_tensors, replace_values
from seqlen_curriculum.batch.row_columns import RowColumns
from seqlen_curriculum.batch.sequence_length import IGNORED, set_batch_sequence_length

__all__ = ["IGNORED", "RowColumns", "iter_tensors", "replace_values", "set_batch_sequence_length"]
