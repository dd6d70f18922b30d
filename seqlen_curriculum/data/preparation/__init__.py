"""From text to a corpus: find and read input files, tokenize, write, resume, merge."""
