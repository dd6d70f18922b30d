"""A model as lm-evaluation-harness asks for it, on top of our scoring: without padding, and shared by all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import GenerationConfig, StoppingCriteriaList

from seqlen_curriculum.data.tokenizer import END_OF_TEXT
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.evaluation.scoring import batches, score
from seqlen_curriculum.evaluation.task import Row, encode

__all__ = ["HarnessModel"]

_NEW_TOKENS = 256  # lm-eval's own, where a task doesn't say


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Every rank asks for all requests, and has all answers; the ranks share the work beneath.

    What is longer than ``seqlen`` loses its beginning, as in lm-eval's own models; ``cut`` counts such requests.
    """

    def __init__(self, model: Any, tokenizer: Any, seqlen: int, ranks: Ranks, batch_tokens: int) -> None:
        super().__init__()
        self._model, self._tokens, self._seqlen = model, tokenizer, seqlen
        self._ranks, self._batch_tokens = ranks, batch_tokens
        self.name = ""
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without context: the end of text, else the model's first token."""
        config = self._model.config
        for number in (self._tokens.token_to_id(END_OF_TEXT), config.bos_token_id, config.eos_token_id):
            if isinstance(number, int):
                return number
        raise ConfigError(
            f"--harness: neither the tokenizer has {END_OF_TEXT} nor the model a bos_token_id; give a tokenizer"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002
        """Tokens of ``string``, none added."""
        return [int(number) for number in encode(self._tokens, string)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log likelihood in nats, whether greedy decoding gives it) of each continuation of its context."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        scores = score(self._model, rows, self._ranks, self._batch_tokens, self.name)
        return [(-float(nll), bool(right)) for nll, right in zip(scores.nll, scores.right, strict=True)]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        tokens = np.array(context + continuation, dtype=np.int64)
        self.cut += len(tokens) > self._seqlen + 1
        return Row(tokens[-self._seqlen - 1 :], min(len(continuation), self._seqlen))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Log likelihood in nats of each whole text, in windows that share no target."""
        owners: list[int] = []
        pairs: list[tuple[None, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for one in get_rolling_token_windows(tokens, self.eot_token_id, self._seqlen, context_len=1):
                owners.append(number)
                pairs.append((None, *make_disjoint_window(one)))
        found = np.zeros(len(requests))
        np.add.at(found, owners, [nats for nats, _ in self._loglikelihood_tokens(pairs)])
        return [float(nats) for nats in found]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Greedy continuations, up to the first of the request's ``until`` texts or the end of text."""
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        texts: dict[int, str] = {}
        for wanted, group in groupby(sorted(range(len(requests)), key=settings.__getitem__), settings.__getitem__):
            numbers = list(group)
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            found = self._generate(prompts, json.loads(wanted))
            texts |= {numbers[place]: text for place, text in found.items()}
        return [texts[number] for number in range(len(requests))]

    def _generate(self, prompts: Sequence[list[int]], settings: Mapping[str, Any]) -> dict[int, str]:
        if settings.get("do_sample"):
            raise ConfigError(f"--harness {self.name}: it asks for random samples; only greedy answers are given here")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        # A prompt keeps half of what a small model reads at once.
        new = min(int(settings.get("max_gen_toks", _NEW_TOKENS)), self._seqlen // 2)
        self.cut += sum(len(prompt) > self._seqlen - new for prompt in prompts)
        ends = [(prompt or [self.eot_token_id])[new - self._seqlen :] for prompt in prompts]
        rows = [Row(np.array([*end, 0], dtype=np.int64), 1) for end in ends]  # the last place isn't read
        own = batches(rows, self._batch_tokens)[self._ranks.rank :: self._ranks.world]
        answers: dict[int, str] = {}
        for batch in own:
            answers |= zip(batch, self._answers([ends[number] for number in batch], stops, new), strict=True)
        return {number: text for part in self._ranks.gather(answers) for number, text in part.items()}

    def _answers(self, prompts: Sequence[list[int]], stops: list[str], new: int) -> list[str]:
        """Texts that follow prompts of one length."""
        end, known = self.eot_token_id, len(prompts[0])

        def stopped(tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            ended = [self._cut_text(row, stops)[1] for row in tokens[:, known:].tolist()]
            return torch.tensor(ended, device=tokens.device)

        greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=end)
        inputs = torch.tensor(prompts, device=self._model.device)
        tokens = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=greedy,
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
        return [self._cut_text(row, stops)[0] for row in tokens[:, known:].tolist()]

    def _cut_text(self, tokens: list[int], stops: list[str]) -> tuple[str, bool]:
        """The text before the first of ``stops`` or the end of text, and whether there is one."""
        end = tokens.index(self.eot_token_id) if self.eot_token_id in tokens else len(tokens)
        text = self._tokens.decode(tokens[:end])
        places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
        return text[: min(places, default=len(text))], bool(places) or end < len(tokens)
