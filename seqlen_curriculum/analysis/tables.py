"""The tables of the page. Every number is a ``<data>`` with its exact value and the place in the report it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seqlen_curriculum.analysis import formats
from seqlen_curriculum.analysis.markup import Markup, joined, table, tag
from seqlen_curriculum.analysis.stability import SPIKE
from seqlen_curriculum.schedule.schedule_config import SIGNIFICANT

__all__ = ["conditions", "cost", "differences", "instability", "launches", "rollbacks", "seeds", "settings", "spikes"]

Report = Mapping[str, Any]
Format = Callable[[Any], str]
_NONE = "–"


def _at(report: Any, path: str) -> Any:
    """What stands at ``runs/0/end/step``; None where the way there ends early."""
    for key in path.split("/"):
        report = report[int(key)] if isinstance(report, list) else report.get(key)
        if report is None:
            return None
    return report


def _number(report: Report, path: str, text: Format) -> Markup:
    value = _at(report, path)
    if value is None:
        return Markup(_NONE)
    return tag("data", text(value), value=json.dumps(value), data_key=path)


def _with_ratio(report: Report, path: str, text: Format, ratio: str) -> Markup:
    """``157B (1.8x)``."""
    number = _number(report, path, text)
    if _at(report, ratio) is None:
        return number
    return joined([number, " ", tag("span", "(", _number(report, ratio, formats.ratio), ")", class_="ratio")])


def _rows(report: Report, columns: Mapping[str, tuple[str, Format]]) -> list[list[str]]:
    """A row a run; a column is a title and where in a run its number stands."""
    return [
        [one["name"], *(_number(report, f"runs/{n}/{path}", text) for path, text in columns.values())]
        for n, one in enumerate(report["runs"])
    ]


def cost(report: Report) -> list[Markup]:
    """Table 2's columns: to reach the first run's best validation perplexity, and at the end."""
    return [*([_reaching(report)] if report["reference"] and len(report["runs"]) > 1 else []), _ends(report)]


def seeds(report: Report) -> Markup:
    """What runs that differ only in their seed came to together."""
    lists: tuple[tuple[str, Format], ...] = (
        ("spikes", formats.count),
        ("max_loss_ratio", formats.plain),
        ("final_valid_loss", formats.plain),
    )
    counts = (("reached", formats.count), ("compared", formats.count))
    ratios = (("consumed_tokens_ratio", formats.ratio), ("hours_ratio", formats.ratio))
    rows = []
    for n, group in enumerate(report["seeds"]):
        at = f"seeds/{n}"
        each = [[_number(report, f"{at}/{key}/{k}", text) for k in range(len(group["runs"]))] for key, text in lists]
        reached, compared = (_number(report, f"{at}/{key}", text) for key, text in counts)
        times = [_number(report, f"{at}/{key}", text) for key, text in ratios]
        mean = _number(report, f"{at}/mean_final_valid_loss", formats.plain)
        row = [group["name"], *(joined(_between(cells, ", ")) for cells in each), mean]
        rows.append([*row, joined([reached, " of ", compared]), *times])
    head = ["Run", f"Spikes over {SPIKE}", "Largest loss ratio", "Final validation loss", "Mean"]
    first = report["seeds"][0]["name"] if rows else ""
    caption = f"Over seeds; best perplexity: that of {first} with the same seed, and how many times fewer (median)"
    return table(caption, [*head, "Reached best perplexity", "Tokens", "Time"], rows)


def _between(cells: Sequence[Markup], text: str) -> list[Markup | str]:
    return [part for cell in cells for part in (text, cell)][1:]


_PLACE = (("step", formats.count), ("consumed_tokens", formats.compact), ("hours", formats.duration))


def _reaching(report: Report) -> Markup:
    reference = report["reference"]
    aim = formats.significant(reference["valid_ppl"])
    rows = []
    for n, one in enumerate(report["runs"]):
        cells = [
            _with_ratio(report, f"runs/{n}/reached/{key}", text, f"runs/{n}/reached_ratio/{key}")
            for key, text in _PLACE
        ]
        rows.append([one["name"], *(cells if one["reached"] else ["never"] * 3)])
    caption = f"To reach {reference['run']}'s best validation perplexity of {aim} (in brackets: how many times fewer)"
    return table(caption, ["Run", "Steps", "Tokens", "Time"], rows)


def _ends(report: Report) -> Markup:
    head = ["Run", "Steps", "Tokens", "Time", "Tokens/s", "Training loss", "Validation loss", "Perplexity"]
    columns = {
        "tokens/s": ("tokens_per_second", formats.count),
        "loss": ("loss", formats.plain),
        "valid loss": ("final/valid_loss", formats.plain),
        "ppl": ("final/valid_ppl", formats.significant),
        "best": ("best/valid_ppl", formats.significant),
        "at": ("best/step", formats.count),
    }
    several, rows = len(report["runs"]) > 1, []
    for n, (name, *rest) in enumerate(_rows(report, columns)):
        place = [_with_ratio(report, f"runs/{n}/end/{key}", text, f"runs/{n}/end_ratio/{key}") for key, text in _PLACE]
        rows.append([name, *(place if several else _bare(report, n)), *rest])
    caption = "At the end" + (
        f" (in brackets: how many times fewer than {report['runs'][0]['name']})" if several else ""
    )
    return table(caption, [*head, "Best perplexity", "At step"], rows)


def _bare(report: Report, n: int) -> list[str]:
    return [_number(report, f"runs/{n}/end/{key}", text) for key, text in _PLACE]


def instability(report: Report) -> list[Markup]:
    """Table 1, the same of validation perplexity, and Table 3."""
    columns = {
        "Steps": ("stability/steps", formats.count),
        f"Loss ratio over {SPIKE}": ("stability/spikes", formats.count),
        "Share of steps": ("stability/spike_share", formats.share),
        "Largest loss ratio": ("stability/max_loss_ratio", formats.plain),
        "At step": ("stability/max_loss_ratio_step", formats.count),
        "Evaluations": ("stability/evaluations", formats.count),
        f"Perplexity ratio over {SIGNIFICANT}": ("stability/fluctuations", formats.count),
        "Largest perplexity ratio": ("stability/max_perplexity_ratio", formats.plain),
    }
    caption = "Stability: training loss and validation perplexity over the least of them before"
    return [table(caption, ["Run", *columns], _rows(report, columns)), _correlations(report)]


def _correlations(report: Report) -> Markup:
    rows = []
    for n, one in enumerate(report["runs"]):
        for name in one["stability"]["correlations"]:
            path = f"runs/{n}/stability/correlations/{name}"
            columns = (("r", lambda r: f"{r:.2f}"), ("p", formats.p_value), ("steps", formats.count))
            cells = [_number(report, f"{path}/{key}", text) for key, text in columns]
            rows.append([one["name"], name.replace("_", " "), *cells])
    head = ["Run", "Loss ratio and Adam's", "Pearson's r", "p-value", "Steps"]
    return table("Correlation of the loss ratio with Adam's variance", head, rows)


_SPIKE: Mapping[str, Format] = {
    "step": formats.count,
    "seqlen": formats.count,
    "lr": formats.significant,
    "loss": formats.plain,
    "ratio": formats.plain,
}


def spikes(report: Report) -> list[Markup]:
    """The spikes of each run that has some; of many the first and the largest."""
    tables = []
    for n, one in enumerate(report["runs"]):
        listed, count = one["stability"]["spikes_listed"], one["stability"]["spikes"]
        places = [f"runs/{n}/stability/spikes_listed/{k}" for k in range(len(listed))]
        rows = [[_number(report, f"{place}/{key}", text) for key, text in _SPIKE.items()] for place in places]
        half = len(listed) // 2
        some = f", the first {half} and the {half} largest others of {count:,}" if count > len(listed) else ""
        head = ["Step", "Seqlen", "Learning rate", "Loss", "Loss ratio"]
        tables.append(table(f"Spikes of {one['name']}{some}", head, rows))
    return [one for one in tables if one]


def rollbacks(report: Report) -> Markup:
    """Where runs went back to an earlier checkpoint and passed over steps."""
    rows = []
    for n, one in enumerate(report["runs"]):
        for k in range(len(one["rollbacks"] or ())):
            path = f"runs/{n}/rollbacks/{k}"
            columns = (
                ("step", formats.count),
                ("loss", formats.plain),
                ("ratio", formats.plain),
                ("returned_to", formats.count),
            )
            cells = [_number(report, f"{path}/{key}", text) for key, text in columns]
            passed = [_number(report, f"{path}/skipped/{end}", formats.count) for end in (0, 1)]
            rows.append([one["name"], *cells, joined([passed[0], " to ", passed[1]])])
    head = ["Run", "Spike at step", "Loss", "Loss ratio", "Went back to step", "Then passed over steps"]
    return table("Rollbacks", head, rows)


def differences(report: Report) -> Markup:
    """The settings that differ, a column a run."""
    rows = [
        [entry["key"], *(_setting(report, f"config/differing/{k}/values/{n}") for n in range(len(report["runs"])))]
        for k, entry in enumerate(report["config"]["differing"])
    ]
    return table("Settings that differ", ["Setting", *_names(report)], rows, "words")


def settings(report: Report) -> Markup:
    """The settings that all the runs share."""
    shared = report["config"]["shared"]
    rows = [[entry["key"], _setting(report, f"config/shared/{k}/value")] for k, entry in enumerate(shared)]
    caption = "Settings that all runs share" if len(report["runs"]) > 1 else "Settings"
    return table(caption, ["Setting", "Value"], rows, "words")


def _setting(report: Report, path: str) -> Markup:
    return _number(report, path, formats.setting)


def _names(report: Report) -> list[str]:
    return [one["name"] for one in report["runs"]]


_DEVICE: Mapping[str, tuple[str, Format]] = {
    "accelerator": ("Accelerator", str),
    "accelerator_memory_bytes": ("Its memory", formats.gibibytes),
    "cpu": ("CPU", str),
    "cores": ("CPU cores", formats.count),
    "memory_bytes": ("Memory", formats.gibibytes),
}


def conditions(report: Report) -> Markup:
    """Ranks, versions and hardware of each run's newest launch, a column a run."""
    newest = [(n, len(one["launches"]) - 1) for n, one in enumerate(report["runs"]) if one["launches"]]
    if not newest:
        return Markup()
    packages = dict.fromkeys(name for n, last in newest for name in report["runs"][n]["launches"][last]["versions"])
    lines: list[tuple[str, str, Format]] = [("Ranks", "ranks", formats.count)]
    lines += [(name, f"versions/{name}", str) for name in packages]
    lines += [(title, f"device/{key}", text) for key, (title, text) in _DEVICE.items()]
    places = [f"runs/{n}/launches/{max(0, len(one['launches'] or ()) - 1)}" for n, one in enumerate(report["runs"])]
    rows = [[title, *(_number(report, f"{place}/{path}", text) for place in places)] for title, path, text in lines]
    caption = "Versions and hardware of the newest launch (the node of rank 0)"
    return table(caption, ["", *_names(report)], _told(rows), "words")


def _told(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    return [row for row in rows if any(cell != _NONE for cell in row[1:])]


def launches(report: Report) -> Markup:
    """Every launch of every run, where a run has several."""
    if all(len(one["launches"] or ()) < 2 for one in report["runs"]):
        return Markup()
    rows = [
        [
            one["name"],
            launch["started"].replace("+00:00", " UTC").replace("T", " "),
            _number(report, f"runs/{n}/launches/{k}/first_step", formats.count),
            _number(report, f"runs/{n}/launches/{k}/ranks", formats.count),
        ]
        for n, one in enumerate(report["runs"])
        for k, launch in enumerate(one["launches"] or ())
    ]
    return table("Launches", ["Run", "Started", "First step", "Ranks"], rows, "words")
