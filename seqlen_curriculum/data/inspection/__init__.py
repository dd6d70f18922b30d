"""Inspection of corpora, and of the tokens that a run reads from them."""
