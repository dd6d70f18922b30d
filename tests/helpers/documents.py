"""Corpora whose tokens show where they are from."""

import numpy as np

from seqlen_curriculum.data.writer import CorpusWriter

END = 0
"""The token that ends each document. Every other token of a corpus is different."""


def write_documents(prefix, lengths, first_token=1):
    """Write documents of ``lengths`` tokens, the last of which is END; return (all tokens, the start of each document)."""
    tokens, starts, token = [], [], first_token
    with CorpusWriter(prefix, 2**20) as writer:
        for length in lengths:
            document = [*range(token, token + length - 1), END][:length] if length else []
            starts.append(len(tokens))
            tokens += document
            token += max(length - 1, 0)
            writer.add_document(np.array(document, np.int64))
    return tokens, starts
