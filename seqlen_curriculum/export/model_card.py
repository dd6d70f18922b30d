"""The ``README.md`` of an exported model: what was trained and how it went, as far as its folders tell; nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from seqlen_curriculum.analysis.formats import count, plain, setting, significant
from seqlen_curriculum.analysis.run import Run

__all__ = ["Facts", "model_card"]

_PAPER = "https://arxiv.org/abs/2108.06084"
_SETTINGS = (
    "model.dropout",
    "curriculum_learning.",
    "batch_size_warmup.",
    "train_batch_size",
    "optimizer.",
    "scheduler.",
    "gradient_clipping",
    "fp16.",
    "bf16.",
    "data.seq_length",
    "data.leftovers",
    "training.",
)
"""Beginnings of the keys that are told: no paths, and not the sizes, which the architecture tells."""


@dataclass(frozen=True)
class Facts:
    """What is known of an exported model."""

    name: str
    architecture: str
    model_type: str
    parameters: int
    sizes: Mapping[str, int]
    dtype: str
    has_tokenizer: bool
    step: int | None = None
    settings: Mapping[str, Any] | None = None
    """Those of the run, flat, out of its checkpoint."""
    run: Run | None = None
    """Up to the checkpoint's step, where its log is there."""
    picture: str | None = None
    """File name of the curves."""


def model_card(facts: Facts) -> str:
    """Markdown with YAML front matter. It names no licence: that is the owner's to choose."""
    parts = [_front_matter(facts), f"# {facts.name}", _architecture(facts)]
    if facts.settings is not None:
        parts += ["## Training", _training(facts)]
    if facts.picture:
        parts.append(f"![Losses, sequence length and learning rate while training]({facts.picture})")
    if facts.settings is not None:
        parts.append(_table("setting", _told(facts.settings)))
    if versions := _versions(facts.run):
        parts.append(_table("trained with", versions))
    return "\n\n".join([*parts, "## Use", _use(facts)]) + "\n"


def _front_matter(facts: Facts) -> str:
    tags = [facts.model_type, *(["sequence-length-warmup"] if _warms_up(facts.settings) else [])]
    listed = "\n".join(f"- {tag}" for tag in tags)
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{listed}\n---"


def _architecture(facts: Facts) -> str:
    sizes = ", ".join(f"`{name}` {count(size)}" for name, size in facts.sizes.items())
    return f"A `{facts.architecture}` of {count(facts.parameters)} parameters in {facts.dtype}: {sizes}."


def _warms_up(settings: Mapping[str, Any] | None) -> bool:
    told = settings or {}
    lengths = [told.get(f"curriculum_learning.{name}_difficulty") for name in ("min", "max")]
    return bool(told.get("curriculum_learning.enabled")) and lengths[0] != lengths[1]


def _training(facts: Facts) -> str:
    assert facts.settings is not None
    rows: list[tuple[str, str]] = [("steps", count(facts.step or 0))]
    if facts.run is not None and facts.run.records:
        rows.append(("tokens", count(facts.run.records[-1]["consumed_tokens"])))
    if facts.run is not None and facts.run.points:
        last = facts.run.points[-1]
        loss, perplexity = plain(last["valid_loss"]), significant(last["valid_ppl"])
        rows.append((f"validation loss at step {count(last['step'])}", f"{loss} (perplexity {perplexity})"))
    table = _table("", rows)
    if not _warms_up(facts.settings):
        return table
    return f"Trained with [Sequence Length Warmup]({_PAPER}), {_lengths(facts.settings, facts.run)}.\n\n{table}"


def _lengths(settings: Mapping[str, Any], run: Run | None) -> str:
    """Those that were read where the log tells of every step, else those of the schedule, which the budget may cut short."""
    if run is not None and run.steps and run.steps[0]["step"] == 1:
        read = [record["seqlen"] for record in run.steps]
        return f"on sequences of {min(read)} to {max(read)} tokens"
    ends = (settings[f"curriculum_learning.{name}_difficulty"] for name in ("min", "max"))
    return "whose schedule goes from {} to {} tokens".format(*ends)


def _told(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    chosen = {key: value for key, value in settings.items() if key.startswith(_SETTINGS) and value is not None}
    return [(f"`{key}`", f"`{setting(value)}`") for key, value in chosen.items()]


def _versions(run: Run | None) -> list[tuple[str, str]]:
    launches = run.info.get("launches") if run is not None else None
    return list(launches[-1]["versions"].items()) if launches else []


def _table(head: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([f"| {head} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _use(facts: Facts) -> str:
    name = repr(facts.name)  # may have quotes in it
    tokenizer = [f"tokenizer = transformers.AutoTokenizer.from_pretrained({name})"] if facts.has_tokenizer else []
    model = f"model = transformers.AutoModelForCausalLM.from_pretrained({name})"
    return "\n".join(["```python", "import transformers", "", *tokenizer, model, "```"])
