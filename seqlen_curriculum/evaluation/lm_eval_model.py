"""A model for lm-evaluation-harness that uses this package's scoring, without padding and on all ranks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from seqlen_curriculum.models.generation import ignore_saved_settings

__all__ = ["HarnessModel"]

_NEW_TOKENS = 256  # lm-eval's default


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """The model for lm-eval's requests. Every rank gets all requests and returns all answers; ranks share the scoring.

    A request longer than ``seqlen`` loses its beginning, as in lm-eval's models. ``truncated_requests`` counts them.
    """

    def __init__(self, model: Any, tokenizer: Any, seqlen: int, ranks: Ranks, batch_tokens: int) -> None:
        super().__init__()
        self._model, self._tokenizer, self._seqlen = model, tokenizer, seqlen
        self._ranks, self._batch_tokens = ranks, batch_tokens
        self.name = ""
        self.truncated_requests = 0
        ignore_saved_settings(model)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: ``<|endoftext|>``, else the model's ``eos_token_id``, else its ``bos_token_id``."""
        return self._first_token("eos_token_id", "bos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: ``<|endoftext|>``, else the model's ``bos_token_id``."""
        return self._first_token("bos_token_id", "eos_token_id")

    def _first_token(self, *names: str) -> int:
        named = [getattr(self._model.config, name, None) for name in names]
        firsts = [ids[0] if isinstance(ids, list) and ids else ids for ids in named]
        for number in (self._tokenizer.token_to_id(END_OF_TEXT), *firsts):
            if isinstance(number, int):
                return number
        raise ConfigError(
            f"--harness: the tokenizer has no {END_OF_TEXT} and the model no bos_token_id; give a tokenizer"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002
        """Return the tokens of ``string``, without special tokens."""
        return [int(number) for number in encode(self._tokenizer, string)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log likelihood in nats, whether it is the greedy choice) of the continuation in each request."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Answer requests of ((context, continuation), context tokens, continuation tokens); lm-eval's signature."""
        rows = []
        for _texts, context, continuation in requests:
            tokens = np.array(context + continuation, dtype=np.int64)
            self.truncated_requests += len(tokens) > self._seqlen + 1  # the last token is a target only
            rows.append(Row(tokens[-self._seqlen - 1 :], min(len(continuation), self._seqlen)))
        scores = score(self._model, rows, self._ranks, self._batch_tokens, self.name)
        return [(-float(nll), bool(right)) for nll, right in zip(scores.nll, scores.right, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Return the log likelihood in nats of each whole text, from windows that don't share targets."""
        # A text of 100 tokens is 4 windows for a seqlen of 32: requests 0, 0, 0, 0, whose sum is the answer.
        window_texts: list[int] = []
        window_requests: list[tuple[None, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._seqlen, context_len=1):
                window_texts.append(number)
                window_requests.append((None, *make_disjoint_window(window)))
        sums = np.zeros(len(requests))
        np.add.at(sums, window_texts, [nats for nats, _ in self._loglikelihood_tokens(window_requests)])
        return [float(nats) for nats in sums]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Return greedy continuations, up to the first of the request's ``until`` strings or the end of text."""
        alike: defaultdict[str, list[int]] = defaultdict(list)  # indices of the requests with the same settings
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        answers: dict[int, str] = {}
        for settings, numbers in sorted(alike.items()):
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            answers |= zip(numbers, self._generate(prompts, json.loads(settings)), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _generate(self, prompts: Sequence[list[int]], settings: Mapping[str, Any]) -> list[str]:
        if settings.get("do_sample"):
            raise ConfigError(f"--harness {self.name}: requires random samples; only greedy decoding is supported")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        # A model with 48 positions asked for 256 tokens generates 24, and reads the last 24 tokens of the prompt.
        new_tokens = min(int(settings.get("max_gen_toks", _NEW_TOKENS)), self._seqlen // 2)
        prompt_tokens = self._seqlen - new_tokens
        self.truncated_requests += sum(len(prompt) > prompt_tokens for prompt in prompts)
        kept = [(prompt or [self.prefix_token_id])[-prompt_tokens:] for prompt in prompts]

        # ``batches`` expects rows of S + 1 tokens, S of which are read: the 0 at the end is a placeholder.
        rows = [Row(np.array([*tokens, 0], dtype=np.int64), 1) for tokens in kept]
        answers: dict[int, str] = {}
        for batch in batches(rows, self._batch_tokens)[self._ranks.rank :: self._ranks.world]:
            answers |= zip(
                batch, self._answer_batch([kept[number] for number in batch], stops, new_tokens), strict=True
            )
        answers = {number: text for share in self._ranks.gather(answers) for number, text in share.items()}
        return [answers[number] for number in range(len(prompts))]

    def _answer_batch(self, prompts: Sequence[list[int]], stops: list[str], new_tokens: int) -> list[str]:
        """Return the continuations of prompts of equal length."""
        end, prompt_tokens = self.eot_token_id, len(prompts[0])

        def stopped(tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            """Return (B) bools: which of the rows of tokens (B, S) are finished."""
            answers = tokens[:, prompt_tokens:].tolist()
            return torch.tensor([self._text_before(answer, stops)[1] for answer in answers], device=tokens.device)

        greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
        inputs = torch.tensor(prompts, device=self._model.device)  # (B, S)
        tokens = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=greedy,
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
        return [self._text_before(answer, stops)[0] for answer in tokens[:, prompt_tokens:].tolist()]

    def _text_before(self, tokens: list[int], stops: list[str]) -> tuple[str, bool]:
        """Return the text before the first of ``stops`` or the end of text, and whether one occurs."""
        end = tokens.index(self.eot_token_id) if self.eot_token_id in tokens else len(tokens)
        text = self._tokenizer.decode(tokens[:end])
        places = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(places, default=len(text))], bool(places) or end < len(tokens)
