"""From text to a corpus: read, tokenize, write, merge."""
