"""Sequence length warmup in other trainers: each module serves one of them and imports it, and no other heavy package."""
