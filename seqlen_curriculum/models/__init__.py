"""Models to train: GPT-2 by way of Hugging Face."""
