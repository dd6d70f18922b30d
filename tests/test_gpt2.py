"""GPT-2: the loss and gradients of Hugging Face's, without its masks and logits.

Shapes: B rows, S seqlen.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gpt2 import TINY, Squares, batch, gradients, reference, relative_error, seeded_gradients, tiny
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.presets import GPT2_PRESETS
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.gpt2 import build_gpt2, save_hf


def test_loss_and_every_gradient_equal_hugging_face_in_double() -> None:
    model = tiny().double()
    hf = reference(model).double()
    inputs, targets = batch()
    model(inputs, targets).backward()
    logits = hf(inputs).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    ours, theirs = gradients(model), gradients(hf)
    assert ours.keys() == theirs.keys()
    # 1e-6, not 1e-12: our softmax is fp32 whatever the dtype
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 1e-6


def test_loss_and_every_gradient_equal_hugging_faces_labels_loss_in_fp32() -> None:
    model = tiny()
    hf = reference(model)
    inputs, targets = batch()
    tokens = torch.cat([inputs, targets[:, -1:]], dim=1)
    # labels are shifted by Hugging Face: N targets of N + 1 tokens, as ours
    expected, loss = hf(tokens, labels=tokens).loss, model(inputs, targets)
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = gradients(hf)
    # two fp32 orders of summation, on either side of the double result
    assert max(relative_error(found, theirs[name]) for name, found in gradients(model).items()) < 2e-6


def test_fused_gelu_is_gpt2s_gelu_new() -> None:
    x = torch.linspace(-6, 6, 10_001, dtype=torch.float64)
    torch.testing.assert_close(ACT2FN["gelu_pytorch_tanh"](x), ACT2FN["gelu_new"](x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("preset", GPT2_PRESETS)
def test_parameter_count_is_the_models(preset: str) -> None:
    config = ModelConfig.model_validate({"preset": preset})
    with torch.device("meta"):
        model = build_gpt2(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()


def test_weights_follow_from_the_seed() -> None:
    first, same, other = tiny(7).state_dict(), tiny(7).state_dict(), tiny(8).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm.transformer.wte.weight"], other["lm.transformer.wte.weight"])


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    inputs, targets = batch()
    assert tiny()(inputs, targets).item() == pytest.approx(math.log(256), abs=0.1)  # 200 words padded to 256


def test_init_is_gpt2s() -> None:
    torch.manual_seed(0)
    block = build_gpt2(ModelConfig.model_validate({"preset": "tiny-1m"})).lm.transformer.h[1]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.03)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.03)
    assert block.attn.c_attn.bias.abs().max().item() == 0


def test_head_and_embedding_are_one_parameter() -> None:
    model = tiny()
    assert model.lm.lm_head.weight is model.lm.transformer.wte.weight
    assert "lm.lm_head.weight" not in dict(model.named_parameters())


class AttentionCalls(TorchFunctionMode):
    """Keyword arguments of every scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(kwargs)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("seqlen", [1, 2, 8, 63, 64])
def test_attention_is_causal_without_a_mask_at_every_seqlen(seqlen: int) -> None:
    model, (inputs, targets) = tiny(), batch(seqlen=seqlen)
    with AttentionCalls() as attention:
        model(inputs, targets).backward()
    assert len(attention.calls) == 2  # one a layer
    assert all(call["is_causal"] is True and call.get("attn_mask") is None for call in attention.calls)


def test_no_tensor_is_seqlen_by_seqlen() -> None:
    model, (inputs, targets) = tiny(), batch(seqlen=37)
    with Squares(37) as squares:
        model(inputs, targets).backward()
    assert squares.found == []
    with Squares(37) as squares:  # the probe sees one where there is one
        reference(model)(inputs)
    assert squares.found


def test_a_token_does_not_see_later_ones() -> None:
    model = tiny().eval()
    inputs, _ = batch(rows=1, seqlen=20)
    changed = inputs.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 200
    before, after = model.lm(inputs).logits[0], model.lm(changed).logits[0]
    assert torch.equal(before[:12], after[:12])
    assert not torch.equal(before[12], after[12])


def test_padding_mask_and_cache_are_refused_or_unused() -> None:
    model, (inputs, _) = tiny(), batch()
    with pytest.raises(NotImplementedError, match="save_hf"):
        model.lm(inputs, attention_mask=torch.ones(3, 1, 37, 37, dtype=torch.bool))
    padded = torch.ones_like(inputs)
    padded[0, -3:] = 0
    with pytest.raises(NotImplementedError, match="padding and masks: save_hf"):
        model.lm(inputs, attention_mask=padded)
    assert torch.equal(model.lm(inputs, attention_mask=torch.ones_like(inputs)).logits, model.lm(inputs).logits)
    past = model.lm(inputs, use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="save_hf"):
        model.lm(inputs[:, -1:], past_key_values=past, use_cache=True)


def test_seqlen_above_the_positions_is_refused() -> None:
    inputs, targets = batch(seqlen=65)
    with pytest.raises(ConfigError, match=r"max_position_embeddings: 64 is below the seqlen 65"):
        tiny()(inputs, targets)


def test_evaluation_without_gradients_gives_the_same_loss() -> None:
    model, (inputs, targets) = tiny(), batch()
    with torch.no_grad():
        evaluated = model.eval()(inputs, targets)
    assert not evaluated.requires_grad
    assert evaluated.item() == model.train()(inputs, targets).item()


def test_gradients_accumulate_over_micro_batches() -> None:
    model, (inputs, targets) = tiny(), batch(rows=4)
    model(inputs, targets).backward()
    whole = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        (model(inputs[rows], targets[rows]) * len(inputs[rows]) / 4).backward()
    assert max(relative_error(grad, whole[name]) for name, grad in gradients(model).items()) < 2e-6


def test_bf16_model_trains() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = tiny().bfloat16(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert loss.dtype == torch.float32
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_gives_the_same_gradients(dropout: float) -> None:
    plain = seeded_gradients(tiny(dropout=dropout), seed=5)
    checkpointed = seeded_gradients(tiny(dropout=dropout, activation_checkpointing=True), seed=5)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize(("checkpointing", "runs"), [(False, 2), (True, 4)])
def test_activation_checkpointing_runs_every_block_twice(checkpointing: bool, runs: int) -> None:
    model, seen = tiny(activation_checkpointing=checkpointing), list[int]()
    for block in model.lm.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda *_: seen.append(1))
    model(*batch()).backward()
    assert len(seen) == runs


def test_dropout_is_on_in_training_only_and_follows_the_seed() -> None:
    model, (inputs, targets) = tiny(dropout=0.5), batch()
    first, same, other = (seeded_gradients(model, seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["transformer.wpe.weight"], other["transformer.wpe.weight"])
    model.eval()
    assert model(inputs, targets).item() == model(inputs, targets).item()


def test_saved_folder_loads_as_hugging_face_with_equal_logits(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = build_gpt2(ModelConfig.model_validate(TINY), eos_token_id=199).eval()
    save_hf(model, tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["config.json", "model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    inputs, _ = batch()
    torch.testing.assert_close(loaded(inputs).logits, model.lm(inputs).logits, rtol=0, atol=1e-6)
    assert (loaded.config.eos_token_id, loaded.config.bos_token_id) == (199, None)
    assert "sdpa_causal" not in (tmp_path / "export" / "config.json").read_text()
    # with a cache, as generation runs it
    assert loaded.generate(inputs[:1, :5], max_new_tokens=3, do_sample=False, pad_token_id=199).shape[1] <= 8


@pytest.mark.parametrize("prefix", ["", "lm."])
def test_saved_folder_takes_a_given_state(tmp_path: Path, prefix: str) -> None:
    source, empty = tiny(1), tiny(2)
    state = {prefix + name: tensor.bfloat16() for name, tensor in source.lm.state_dict().items()}
    save_hf(empty, tmp_path, state)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, source.lm.state_dict()[name].bfloat16())
