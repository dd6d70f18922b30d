"""The whole run by arithmetic: lengths, rows, tokens and learning rates of any step."""
