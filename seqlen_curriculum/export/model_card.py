"""The ``README.md`` of an exported model: its training settings and results, as recorded in its folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from seqlen_curriculum.analysis.formats import count, plain, setting, significant
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.run_folder.model_folder import is_encoder

__all__ = ["ModelCard"]

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
"""Prefixes of the keys on the card, without paths and without model sizes, which are in the first sentence."""


@dataclass(frozen=True)
class ModelCard:
    """The facts of an exported model, and the card that shows them."""

    name: str
    architecture: str
    model_type: str
    parameters: int
    sizes: Mapping[str, int]
    dtype: str
    has_tokenizer: bool
    step: int | None = None
    settings: Mapping[str, Any] | None = None
    """The run's settings from its checkpoint, with flat keys such as ``optimizer.params.lr``."""
    run: Run | None = None
    """The run's log up to the checkpoint's step, if any."""
    picture: str | None = None
    """File name of the curves."""

    @property
    def is_encoder(self) -> bool:
        """True for an encoder that was trained on masked tokens."""
        return is_encoder({"architectures": [self.architecture]})

    def markdown(self) -> str:
        """Return the card with its YAML front matter, without a licence, which the owner must choose."""
        parts = [self.front_matter(), f"# {_escaped(self.name)}", self.architecture_line()]
        if self.settings is not None:
            parts += ["## Training", self.training()]
        if self.picture:
            parts.append(f"![Losses, sequence length and learning rate while training]({self.picture})")
        if self.settings is not None:
            # Flat keys, so that "optimizer." selects ``optimizer.type`` and ``optimizer.params.lr``.
            shown = {name: value for name, value in self.settings.items() if name.startswith(_SETTINGS)}
            rows = [(_code(name), _code(setting(value))) for name, value in shown.items() if value is not None]
            parts.append(_table("setting", rows))
        launches = self.run.info.get("launches") if self.run is not None else None
        if launches and launches[-1]["versions"]:
            versions = launches[-1]["versions"].items()
            parts.append(_table("trained with", [(_escaped(name), _escaped(version)) for name, version in versions]))
        return "\n\n".join([*parts, "## Use", self.usage()]) + "\n"

    def front_matter(self) -> str:
        """Return the YAML that the Hugging Face hub reads."""
        tags = [json.dumps(self.model_type) if _SPECIAL.search(self.model_type) else self.model_type]
        if self.warms_up():
            tags.append("sequence-length-warmup")
        tag_lines = "\n".join(f"- {tag}" for tag in tags)
        task = "fill-mask" if self.is_encoder else "text-generation"
        return f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n{tag_lines}\n---"

    def architecture_line(self) -> str:
        """Return a sentence with the class, parameters, dtype and sizes."""
        sizes = ", ".join(f"`{name}` {count(size)}" for name, size in self.sizes.items())
        return f"A {_code(self.architecture)} of {count(self.parameters)} parameters in {self.dtype}: {sizes}."

    def warms_up(self) -> bool:
        """Return whether the run has a curriculum whose length changes."""
        settings = self.settings or {}
        shortest, longest = (settings.get(f"curriculum_learning.{end}_difficulty") for end in ("min", "max"))
        return bool(settings.get("curriculum_learning.enabled")) and shortest != longest

    def training(self) -> str:
        """Return a paragraph with steps, tokens, final validation loss, and the lengths of a warmup."""
        rows = [("steps", count(self.step or 0))]
        if self.run is not None and self.run.records:
            rows.append(("tokens", count(self.run.records[-1]["consumed_tokens"])))
        if self.run is not None and self.run.points:
            last = self.run.points[-1]
            loss, perplexity = plain(last["valid_loss"]), significant(last["valid_ppl"])
            name = "pseudo-perplexity of masked tokens" if self.is_encoder else "perplexity"
            rows.append((f"validation loss at step {count(last['step'])}", f"{loss} ({name} {perplexity})"))
        table = _table("", rows)
        if not self.warms_up():
            return table
        return f"Trained with [Sequence Length Warmup]({_PAPER}), {self.lengths()}.\n\n{table}"

    def lengths(self) -> str:
        """Return the range of sequence lengths, from the log if it starts at step 1, else from the schedule.

        The run may not have reached the last length of the schedule, because the token budget can end it first.
        """
        if self.run is not None and self.run.steps and self.run.steps[0]["step"] == 1:
            trained = [record["seqlen"] for record in self.run.steps]
            return f"on sequences of {min(trained)} to {max(trained)} tokens"
        assert self.settings is not None
        shortest, longest = (self.settings[f"curriculum_learning.{end}_difficulty"] for end in ("min", "max"))
        return f"whose schedule goes from {_escaped(shortest)} to {_escaped(longest)} tokens"

    def usage(self) -> str:
        """Return the code that loads the model."""
        lines = ["```python", "import transformers", ""]
        folder = repr(self.name)  # may contain quotes
        if self.has_tokenizer:
            lines.append(f"tokenizer = transformers.AutoTokenizer.from_pretrained({folder})")
        auto = "AutoModelForMaskedLM" if self.is_encoder else "AutoModelForCausalLM"
        lines += [f"model = transformers.{auto}.from_pretrained({folder})", "```"]
        return "\n".join(lines)


_SPECIAL = re.compile(r"[\\`*\[\]<>#|!~$&:]")
"""Characters that have a meaning in Markdown or HTML, or start a link."""


def _escaped(text: object) -> str:
    """Return ``text`` on one line, without HTML or links, because somebody else may have chosen it."""
    line = " ".join(str(text).encode(errors="replace").decode().split())
    # An entity such as &#60; shows its character in text and in a table, and no more.
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", line) if _SPECIAL.search(line) else line


def _code(text: object) -> str:
    """Return ``text`` on one line as code in a cell of a table."""
    line = " ".join(str(text).split())
    return f"<code>{_escaped(line)}</code>" if re.search(r"[`|<>&]", line) else f"`{line}`"


def _table(head: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([f"| {head} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
