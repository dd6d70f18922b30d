"""Checkpoints as Hugging Face models with a model card."""
