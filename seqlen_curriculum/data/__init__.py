"""Read, write, order and sample corpora, each addressed as one stream of tokens.

Preparing a corpus from text is in ``seqlen_curriculum.data.preparation``, the only part that needs ``tokenizers``.
"""

from seqlen_curriculum.data.blend import Blend
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.permutation import permute
from seqlen_curriculum.data.samples import Samples, check_token_ids, open_split, split_bounds
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.data.writer import CorpusWriter

__all__ = [
    "Blend",
    "CorpusWriter",
    "IndexedCorpus",
    "Samples",
    "TrainingData",
    "check_token_ids",
    "open_split",
    "permute",
    "split_bounds",
]
