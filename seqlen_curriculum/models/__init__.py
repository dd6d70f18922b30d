"""Models to train: GPT-2 and other causal language models of Hugging Face."""
