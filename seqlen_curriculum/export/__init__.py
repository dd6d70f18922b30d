"""Export of checkpoints as Hugging Face models with a model card."""
