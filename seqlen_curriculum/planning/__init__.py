"""Plan a run before it starts: as numbers, as text and as a picture, and on any number of ranks. Needs no torch."""
