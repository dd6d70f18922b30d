"""Runs for reports, with given losses."""

import math

from seqlen_curriculum.analysis.run import Run


def synthetic(name, losses, valid_losses, seconds=36.0, tokens=100, **changes):
    """Return a run with steps of ``seconds`` and ``tokens``, and evaluations of 9 s with ``valid_losses`` {step: loss}."""
    records = []
    for step, loss in enumerate(losses, 1):
        at = {"step": step, "consumed_tokens": tokens * step}
        records.append({**at, "seqlen": 8, "rows": 4, "loss": loss, "lr": 0.1, "grad_norm": 1.0, "seconds": seconds})
        if step in valid_losses:
            valid = {"valid_loss": valid_losses[step], "valid_ppl": math.exp(valid_losses[step])}
            records.append({**at, **valid, "seconds": 9.0})
    return Run(name, records, **changes)


BASE = synthetic("base", [4.0, 3.0, 3.9, 2.0], {2: 2.5, 4: 2.0})
