"""What is in a corpus, and what a run reads of it."""
