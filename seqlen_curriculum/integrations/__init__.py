"""Sequence length warmup in other trainers. Each module imports at most one heavy package."""
