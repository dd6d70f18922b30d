"""Plan a run before it starts, as numbers, text and a plot, for any number of ranks. Needs no torch."""
