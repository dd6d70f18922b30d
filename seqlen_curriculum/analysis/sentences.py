"""The two sentences at the head of a report; all other numbers are in its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seqlen_curriculum.analysis.formats import count, plain, significant
from seqlen_curriculum.analysis.stability import SPIKE

__all__ = ["best_run", "best_seeds", "loss_spikes", "outcome"]


def outcome(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence about the best run and one about loss spikes."""
    best = best_seeds(report["seeds"]) if report["seeds"] else best_run(report["runs"])
    return [best, loss_spikes(report["runs"])]


def best_seeds(groups: Sequence[Mapping[str, Any]]) -> str:
    """Name the configuration with the lowest mean loss over its seeds."""
    finished = [group for group in groups if group["mean_final_valid_loss"] is not None]
    if not finished:
        return "No configuration has a final evaluation for each of its seeds yet."
    best = min(finished, key=lambda group: float(group["mean_final_valid_loss"]))
    loss = plain(best["mean_final_valid_loss"])
    return f"Over seeds, {best['name']} has the lowest mean final validation loss, {loss}."


def best_run(runs: Sequence[Mapping[str, Any]]) -> str:
    """Name the run that reached the first run's best perplexity with the fewest tokens, or that came closest."""
    first, *others = runs
    if first["best"] is None:
        return f"{first['name']} has no evaluation yet."
    perplexity = f"best validation perplexity of {significant(first['best']['valid_ppl'])}"
    if not others:
        return f"{first['name']} reached its {perplexity} at step {count(first['best']['step'])}."
    reached = [run for run in others if run["reached"]]
    if reached:
        best = min(reached, key=lambda run: int(run["reached"]["consumed_tokens"]))
        # 4.0x fewer tokens are 25% of them; a percentage also reads well for a run that needed more.
        ratios = best["reached_ratio"]
        time = f" and {1 / ratios['hours']:.0%} of the time" if ratios["hours"] else ""
        tokens = f"{1 / ratios['consumed_tokens']:.0%} of the tokens"
        return f"{best['name']} reached {first['name']}'s {perplexity} with {tokens}{time}."
    sentence = f"None of the other runs has reached {first['name']}'s {perplexity}"
    evaluated = [run for run in others if run["best"]]
    if not evaluated:
        return f"{sentence}."
    closest = min(evaluated, key=lambda run: float(run["best"]["valid_loss"]))
    return f"{sentence}; the closest is {closest['name']} with {significant(closest['best']['valid_ppl'])}."


def loss_spikes(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of runs with spikes, and the run with the most, as a sentence."""
    definition = f"training loss above {SPIKE} times its lowest earlier value"
    spiking = [run for run in runs if run["stability"]["spikes"]]
    if spiking:
        worst = max(spiking, key=lambda run: int(run["stability"]["spikes"]))
        most = f"{count(worst['stability']['spikes'])} in {count(worst['stability']['steps'])} steps"
        sentence = f"Loss spikes ({definition}): "
        sentence += (
            most if len(runs) == 1 else f"in {len(spiking)} of {len(runs)} runs, most in {worst['name']}, {most}"
        )
    else:
        sentence = f"No loss spikes ({definition})"
    # Steps that a rollback undid are no longer in the log, so a run without spikes may have had some.
    rollbacks = sum(len(run["rollbacks"] or ()) for run in runs)
    return f"{sentence}; rollbacks: {rollbacks}." if rollbacks else f"{sentence}."
