"""The schedules of a run as pure functions of the step: sequence length, rows, consumed tokens, learning rate."""
