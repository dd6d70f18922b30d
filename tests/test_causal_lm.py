"""Any causal language model: the loss and gradients of transformers', from hidden states.

Shapes: B rows, S seqlen, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.architectures import CONFIGS, VOCAB, ours, tokens, transformers_model
from helpers.gpt2 import gradients, relative_error
from helpers.largest_tensor import LargestTensor
from torch import Tensor, nn
from torch.nn import functional as F

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.causal_lm import AnyCausalLM
from seqlen_curriculum.models.gpt2 import checkpoint_activations

OWN_ATTENTION = {"gemma2": "softcap", "gpt_oss": "s_aux", "llama4": "its masks"}
OWN_ATTENTION |= dict.fromkeys(("gptj", "bloom", "mpt"), "it doesn't attend through transformers' AttentionInterface")
EXPERTS = ("mixtral", "olmoe", "qwen3_moe")


def their_loss(lm: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Transformers' loss by labels, which it shifts itself: N targets of N + 1 tokens."""
    labels = torch.cat([torch.full_like(inputs[:, :1], -100), targets[:, :-1]], dim=1)
    row = lm(input_ids=inputs, labels=labels, use_cache=False)  # the last target isn't among the labels
    last = F.cross_entropy(row.logits[:, -1], targets[:, -1])
    balance = 0 if getattr(row, "aux_loss", None) is None else lm.router_aux_loss_coef * row.aux_loss
    seqlen = inputs.shape[1]
    loss: Tensor = ((row.loss - balance) * (seqlen - 1) + last) / seqlen + balance
    return loss


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_equal_transformers_in_fp32(name: str) -> None:
    model, theirs, (inputs, targets) = ours(name).train(), transformers_model(name).train(), tokens()
    expected, loss = their_loss(theirs, inputs, targets), model(inputs, targets)
    expected.backward()
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found, wanted = gradients(model), gradients(theirs)
    assert found.keys() == wanted.keys()
    largest = max(float(grad.norm()) for grad in wanted.values())
    errors = {key: float((found[key] - grad).norm()) / largest for key, grad in wanted.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_has_the_loss_and_those_with_the_interface_have_the_attention(name: str) -> None:
    refused = ours(name).abilities.refused
    if name in OWN_ATTENTION:
        assert set(refused) == {"attention", "windows"}
        assert OWN_ATTENTION[name] in refused["attention"]
    else:
        assert refused == {}


@pytest.mark.parametrize("name", ["llama", "neox", "opt", "phi", "mixtral"])
def test_parameters_keep_their_names_and_weights(name: str) -> None:
    model, theirs = ours(name), dict(transformers_model(name).named_parameters())
    assert {key.removeprefix("lm."): weight.shape for key, weight in model.named_parameters()} == {
        key: weight.shape for key, weight in theirs.items()
    }
    assert all(torch.equal(weight, theirs[key.removeprefix("lm.")]) for key, weight in model.named_parameters())
    assert len(model.blocks) == 2


@pytest.mark.parametrize(
    ("name", "scale", "cap"), [("cohere", 0.25, None), ("granite", 1 / 6, None), ("gemma2", 1, 30)]
)
def test_the_scale_and_the_cap_of_logits_are_found(name: str, scale: float, cap: float | None) -> None:
    head = ours(name).head
    assert head is not None
    assert (head.scale, head.cap) == (pytest.approx(scale, rel=1e-7), cap)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2"])
def test_logits_are_never_held_whole(name: str) -> None:
    model = ours(name, vocab_size=2000)
    with LargestTensor() as largest:
        model(*tokens(rows=16, seqlen=64)).backward()
    assert largest.numel <= 256 * 2000  # a chunk's, not 16 * 64 * 2000


@pytest.mark.parametrize("name", EXPERTS)
def test_an_evaluation_has_no_auxiliary_loss(name: str) -> None:
    model, theirs, (inputs, targets) = ours(name).eval(), transformers_model(name).eval(), tokens()
    logits = theirs(input_ids=inputs, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert model(inputs, targets).item() == pytest.approx(expected, rel=1e-6)
    assert model.train()(inputs, targets).item() > expected + 0.01


@pytest.mark.parametrize("name", ["llama", "opt", "olmoe", "gemma2", "bloom"])
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    expected = {}
    for checkpointing in (False, True):
        model = ours(name).train()
        if checkpointing:
            checkpoint_activations(model.lm)
        model(*tokens()).backward()
        expected = expected or gradients(model)
        assert all(torch.equal(grad, expected[key]) for key, grad in gradients(model).items())


def test_an_architecture_without_activation_checkpointing_is_refused() -> None:
    lm = transformers_model("llama")
    lm.supports_gradient_checkpointing = False
    with pytest.raises(
        ConfigError, match=r"model\.activation_checkpointing: true, but LlamaForCausalLM does not support"
    ):
        checkpoint_activations(lm)


class SquaredHead(nn.Linear):
    """A head that isn't linear."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) ** 2


def test_another_head_keeps_its_logits() -> None:
    lm = transformers_model("llama")
    lm.lm_head = SquaredHead(32, VOCAB, bias=False)
    model, (inputs, targets) = AnyCausalLM(lm), tokens()
    expected = F.cross_entropy(lm(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    assert model.abilities.refused == {"loss": "its output layer is a SquaredHead"}
    assert model(inputs, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_what_an_architecture_lacks_is_refused_by_name() -> None:
    model = ours("bloom")
    with pytest.raises(
        ConfigError, match=r"training.compile: true doesn't work with a bloom \(BloomForCausalLM\): it does"
    ):
        model.require("attention", "training.compile: true")
    with pytest.raises(ConfigError, match='method: "window" doesn\'t work with a bloom'):
        _ = model.attentions
    model.require("loss", "anything")


def test_the_model_keeps_its_mode_and_its_configuration() -> None:
    lm = transformers_model("bloom").train()
    before = lm.config.to_dict()
    AnyCausalLM(lm)
    assert lm.training
    assert lm.config._attn_implementation == "eager"
    assert lm.config.to_dict() == before


def test_relative_errors_of_bf16_are_those_of_bf16() -> None:
    for name in ("llama", "granite", "gemma2"):
        model, (inputs, targets) = ours(name), tokens()
        exact = model(inputs, targets).item()
        loss = model.bfloat16()(inputs, targets)
        assert loss.dtype == torch.float32
        assert relative_error(loss.detach(), torch.tensor(exact)) < 1e-2
