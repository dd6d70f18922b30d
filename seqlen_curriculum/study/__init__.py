"""Studies: cases of one run, each at its own learning rate, compared over seeds that tuning has not seen."""
