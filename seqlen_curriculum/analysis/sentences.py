"""What came out of the runs, in sentences made from the report's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from seqlen_curriculum.analysis import formats
from seqlen_curriculum.analysis.stability import SPIKE

__all__ = ["describe_comparison", "outcome"]

_TOLD = 4
"""So many runs' spikes are told one by one."""

One = Mapping[str, Any]


def outcome(report: Mapping[str, Any]) -> list[str]:
    """The sentences at the head of a page: quality and its cost, then stability."""
    first, *others = report["runs"]
    if report["seeds"]:
        return [describe_seeds(report["seeds"])[0], _seed_spikes(report["seeds"])]
    if not others:
        return [_alone(first), _spikes([first])]
    if report["reference"] is None:
        return [f"{first['name']} has no evaluation, so nothing can be compared with it.", _spikes(report["runs"])]
    return [_comparison(others, first), _spikes(report["runs"])]


def describe_seeds(groups: Sequence[One]) -> list[str]:
    """What runs of several seeds came to: the outcome in a sentence, then a line a group for a terminal."""
    measured = [group for group in groups if group["mean_final_valid_loss"] is not None]
    if not measured:
        return ["Not every run has ended with an evaluation, so nothing can be compared over seeds yet."]
    best = min(measured, key=lambda group: float(group["mean_final_valid_loss"]))
    sentence = f"Over seeds, {best['name']} came to the lowest mean final validation loss, {_finals(best)}"
    sentence += "." if best is groups[0] else f"; {groups[0]['name']} to {_finals(groups[0])}."
    width = max(len(group["name"]) for group in groups)
    return [sentence, *(f"{group['name']:<{width}}  {_seed_line(group)}" for group in groups)]


def _finals(group: One) -> str:
    losses = group["final_valid_loss"]
    if None in losses:
        return "unknown"
    spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    return f"{group['mean_final_valid_loss']:.3f}{spread}"


def _seed_line(group: One) -> str:
    ratios = [ratio for ratio in group["max_loss_ratio"] if ratio is not None]
    spikes = ", ".join(map(formats.count, group["spikes"]))
    told = [f"valid. loss {_finals(group)}", f"spikes {spikes}", f"largest ratio {max(ratios, default=math.nan):.3f}"]
    if group["reached"]:
        tokens, hours = (formats.ratio(group[key]) for key in ("consumed_tokens_ratio", "hours_ratio"))
        told.append(f"tokens {tokens}, time {hours}")
    told.append(f"reached {group['reached']} of {group['compared']}")
    return "; ".join(told)


def _seed_spikes(groups: Sequence[One]) -> str:
    by_spikes = sorted(groups, key=lambda group: -sum(group["spikes"]))
    some = [group for group in by_spikes if any(group["spikes"])][:_TOLD]
    what = f"a loss over {SPIKE} times the least before it"
    if not some:
        return f"No run had a loss spike ({what})."
    told = "; ".join(
        f"{group['name']} {formats.count(sum(group['spikes']))} in {len(group['runs'])} runs, up to "
        f"{max(filter(None, group['max_loss_ratio'])):.2f}x"
        for group in some
    )
    others = len(groups) - len(some)
    return f"Loss spikes ({what}): {told}{f'; {others} others no more' if others else ''}."


def _alone(one: One) -> str:
    end = f"{formats.compact(one['end']['consumed_tokens'])} tokens and {formats.duration(one['end']['hours'])}"
    if one["best"] is None:
        return f"{one['name']} came to a training loss of {formats.plain(one['loss'])} in {end}; it has no evaluation."
    best, at = formats.significant(one["best"]["valid_ppl"]), formats.count(one["best"]["step"])
    return f"{one['name']} came to a validation perplexity of {best}, at step {at}, in {end}."


def _comparison(others: Sequence[One], first: One) -> str:
    """The one that got there with the fewest tokens, or closest; and how many of several got there."""
    reached = sorted(
        (one for one in others if one["reached"]), key=lambda one: float(one["reached"]["consumed_tokens"])
    )
    closest = sorted((one for one in others if one["best"]), key=lambda one: float(one["best"]["valid_loss"]))
    told = _against([*reached, *closest, *others][0], first)
    several = f" Of {len(others)} runs compared with {first['name']}, {len(reached) or 'none'} reached it."
    return told + several * (len(others) > 1)


def _against(one: One, first: One) -> str:
    aim = f"{first['name']}'s best validation perplexity of {formats.significant(first['best']['valid_ppl'])}"
    if one["best"] is None:
        return f"{one['name']} has no evaluation."
    if one["reached"] is None:
        return f"{one['name']} has not reached {aim}; its own best is {formats.significant(one['best']['valid_ppl'])}."
    ratios = one["reached_ratio"]
    tokens, time = _times(ratios["consumed_tokens"], "fewer", "more"), _times(ratios["hours"], "less", "more")
    return f"{one['name']} reached {aim} with {tokens} tokens and in {time} time."


def _times(ratio: float | None, less: str, more: str) -> str:
    """``1.8x fewer``, ``1.2x more`` or ``as much``-like words for how a run compares."""
    if ratio is None or formats.ratio(ratio) == formats.ratio(1):
        return "about as many" if less == "fewer" else "about as much"
    return f"{formats.ratio(ratio)} {less}" if ratio > 1 else f"{formats.ratio(1 / ratio)} {more}"


def _spikes(runs: Sequence[One]) -> str:
    what = f"a loss over {SPIKE} times the least before it"
    if not any(one["stability"]["spikes"] or one["rollbacks"] for one in runs):
        return f"No run had a loss spike ({what})." if len(runs) > 1 else f"It had no loss spike ({what})."
    told = "; ".join(_spike_count(one) for one in sorted(runs, key=_trouble, reverse=True)[:_TOLD])
    rest = f"; {len(runs) - _TOLD} others had no more" if len(runs) > _TOLD else ""
    return f"Loss spikes ({what}): {told}{rest}."


def _trouble(one: One) -> tuple[int, int]:
    return len(one["rollbacks"] or ()), one["stability"]["spikes"]


def _spike_count(one: One) -> str:
    spikes, most = one["stability"]["spikes"], one["stability"]["max_loss_ratio"]
    told = f"{one['name']} {formats.count(spikes)} in {formats.count(one['stability']['steps'])} steps"
    rollbacks = len(one["rollbacks"] or ())
    told += f", up to {most:.2f}x" if spikes else ""
    return told + (f", after {rollbacks} rollback{'s' * (rollbacks > 1)}" if rollbacks else "")


def describe_comparison(report: Mapping[str, Any]) -> str:
    """Table 2's comparison as lines for a terminal; the runs' names stand before it."""
    if report["reference"] is None:
        return f"no comparison: {report['runs'][0]['name']} has no evaluation"
    if report["seeds"]:
        return "\n".join(describe_seeds(report["seeds"]))
    head = f"to reach {report['reference']['run']}'s best validation perplexity"
    lines = [f"{head} of {formats.significant(report['reference']['valid_ppl'])}"]
    width = max(len(one["name"]) for one in report["runs"])
    return "\n".join([*lines, *(f"{one['name']:<{width}}  {_cost(one)}" for one in report["runs"])])


def _cost(one: One) -> str:
    point, ratios = one["reached"], one["reached_ratio"]
    if point is None:
        return "never"
    texts = {
        "step": f"{formats.count(point['step'])} steps",
        "consumed_tokens": f"{formats.compact(point['consumed_tokens'])} tokens",
        "hours": formats.duration(point["hours"]),
    }
    return ", ".join(
        f"{texts[name]} ({formats.ratio(ratios[name])})" if ratios[name] else texts[name] for name in texts
    )
