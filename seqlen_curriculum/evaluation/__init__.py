"""Zero-shot evaluation: Megatron's WikiText-103 and LAMBADA, and the tasks of GPT-3 by way of lm-evaluation-harness."""
