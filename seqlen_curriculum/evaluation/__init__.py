"""Zero-shot evaluation: WikiText-103 and LAMBADA as in Megatron, and GPT-3's tasks through lm-evaluation-harness."""
