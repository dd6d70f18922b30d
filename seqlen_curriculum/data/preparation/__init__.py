"""Preparation of a corpus from text: find and read input files, tokenize, write, resume, merge."""
