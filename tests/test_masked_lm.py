"""Encoders: the loss of masked tokens equals transformers' own, without logits of other tokens.

Shapes: B rows, S tokens, M masked targets of a row, V vocabulary.
"""

import json

import pytest
import torch
from helpers.encoders import MASK, V, configs, write_encoder, write_tokenizer
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForPreTraining

from seqlen_curriculum.config.encoder_counts import count_encoder
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.objective import Masking
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.export.huggingface import export
from seqlen_curriculum.models.causal_lm import build_model, save_model
from seqlen_curriculum.models.generation import Sampling, generate
from seqlen_curriculum.models.masked_lm import MaskedLM
from seqlen_curriculum.models.pretrained import load_model

NAMES = ["bert", "roberta", "modernbert", "electra", "distilbert"]
MASKING = Masking(1234, 0.2, MASK, (0, 1, 2), V)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {name: write_encoder(root / name, name) for name in configs()}


def section(folder):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2} if folder.name == "distilbert" else {}
    return ModelConfig(hf_checkpoint=str(folder), **sizes)


def rows_of(count=3, seqlen=40):
    """Return masked inputs (B, S) and targets (B, 2, M), and the labels of transformers, -100 elsewhere."""
    tokens = torch.randint(4, MASK, (count, seqlen), generator=torch.Generator().manual_seed(0)).numpy()
    inputs, targets = map(torch.from_numpy, MASKING.of_step(tokens, tokens, 1, 0))
    labels = torch.full_like(inputs, -100).scatter(1, targets[:, 0], targets[:, 1])
    return inputs, targets, labels


@pytest.mark.parametrize("name", [*NAMES, "mobilebert"])
def test_the_loss_and_its_gradients_are_those_of_transformers(folders, name):
    model, reference = build_model(section(folders[name])).eval(), load_model(folders[name])
    assert isinstance(model, MaskedLM)
    assert model.sparse == (name != "mobilebert")  # whose head is no linear layer
    inputs, targets, labels = rows_of()
    loss, expected = model(inputs, targets), reference(input_ids=inputs, labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = dict(reference.named_parameters())
    for weight_name, weight in model.lm.named_parameters():
        other = theirs[weight_name].grad
        assert (weight.grad is None) == (other is None), weight_name
        if other is not None:
            torch.testing.assert_close(weight.grad, other, rtol=1e-4, atol=1e-6)


class LargestProduct(TorchDispatchMode):
    """Records the most rows that any tensor of V columns has."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[-1] == V and leaf.dim() > 1:
                self.rows = max(self.rows, leaf.numel() // V)
        return out


@pytest.mark.parametrize("name", NAMES)
def test_no_logits_of_tokens_that_are_not_predicted(folders, name):
    model = build_model(section(folders[name])).eval()
    inputs, targets, _ = rows_of(count=64, seqlen=20)  # 1,280 tokens, 256 targets
    found = []
    for sparse in (True, False):
        model.sparse = sparse
        with LargestProduct() as products:
            loss = model(inputs, targets).item()
        found.append((loss, products.rows))
    assert found[0][1] <= 256
    assert found[1][1] == 1280
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)


def test_logits_are_available_between_losses(folders):
    model, reference = build_model(section(folders["bert"])).eval(), load_model(folders["bert"])
    inputs, targets, _ = rows_of()
    model(inputs, targets)
    torch.testing.assert_close(model.lm(inputs).logits, reference(inputs).logits)


@pytest.mark.parametrize("name", [*NAMES, "mobilebert"])
def test_a_saved_model_has_the_same_logits(folders, name, tmp_path):
    model = build_model(section(folders[name])).eval()
    save_model(model, tmp_path, {key: weight.detach() for key, weight in model.named_parameters()})
    with torch.no_grad():
        inputs, _, _ = rows_of()
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(inputs).logits, load_model(folders[name])(inputs).logits, rtol=0, atol=0)


def test_fresh_weights_depend_on_the_seed_alone(folders):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(
            build_model(section(folders["bert"]), read_weights=False).lm.bert.embeddings.word_embeddings.weight
        )
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_activations_are_recomputed_with_the_same_gradients(folders):
    inputs, targets, _ = rows_of()
    gradients = []
    for checkpoints in (False, True):
        config = section(folders["bert"]).model_copy(update={"activation_checkpointing": checkpoints})
        model = build_model(config).train()
        model(inputs, targets).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_are_counted_from_the_folder(folders):
    for name in NAMES:
        config = section(folders[name])
        counted = sum(weight.numel() for weight in build_model(config).parameters())
        assert config.parameter_count() == counted, name
        assert counted < 200_000


def config_of(name, **changes):
    """Return the ``config.json`` of a tiny encoder."""
    config = configs()[name]
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForMaskedLM"]
    return {**json.loads(config.to_json_string(use_diff=False)), **changes}


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "electra"])
def test_a_new_encoder_of_a_configuration(name):
    torch.manual_seed(0)
    model = build_model(ModelConfig(hf_config=config_of(name, vocab_size=500))).eval()
    assert model.sparse
    assert model.lm.config.vocab_size == 512  # padded, as for causal models
    inputs, targets, labels = rows_of()
    loss = torch.nn.functional.cross_entropy(model.lm(inputs).logits.flatten(0, 1), labels.flatten())
    assert model(inputs, targets).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "transformers can't build this encoder: .*not a multiple"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama"}, "'llama' has no encoder for masked tokens"),
        ({"architectures": ["BertForTokenClassification"]}, "a ...ForCausalLM, or a ...ForMaskedLM"),
        ({"architectures": None, "model_type": "modernbert"}, r'add "architectures": \["ModernBertForMaskedLM"\]'),
    ],
)
def test_configurations_of_no_encoder_are_refused(changes, message):
    with pytest.raises((ConfigError, ValidationError), match=message):
        build_model(ModelConfig(hf_config=config_of("bert", **changes)))


def test_an_encoder_that_needs_a_padding_token_is_refused_without():
    with pytest.raises(ConfigError, match=r"model.hf_config: RobertaForMaskedLM can't read four tokens"):
        build_model(ModelConfig(hf_config=config_of("roberta", pad_token_id=None)))


def test_weights_of_other_heads_in_the_folder_are_left_out(tmp_path):
    """As in bert-base-uncased, which has the weights of a pooler and of next sentence prediction."""
    BertForPreTraining(configs()["bert"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    model = build_model(section(tmp_path))
    assert section(tmp_path).parameter_count() == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(("name", "positions"), [("bert", 64), ("roberta", 64), ("modernbert", None)])
def test_rows_longer_than_the_positions_are_refused(folders, name, positions):
    model = build_model(section(folders[name]))
    assert model.max_positions == positions  # RoBERTa's first two of 66 aren't used
    if positions:
        inputs, targets, _ = rows_of(seqlen=positions)
        model(inputs, targets)
        inputs, targets, _ = rows_of(seqlen=positions + 1)
        with pytest.raises(ConfigError, match=r"data.seq_length: rows of 65 tokens are longer than the 64 positions"):
            model(inputs, targets)


def test_text_is_not_generated_by_an_encoder(folders):
    with pytest.raises(ConfigError, match=r"BertForMaskedLM is an encoder.*can't continue a text"):
        next(generate(folders["bert"], ["a"], Sampling()))


def test_an_export_is_the_folder_of_an_encoder(folders, tmp_path):
    write_tokenizer(folders["bert"] / "tokenizer.json", special=("<end>", "[CLS]"))
    export(folders["bert"], tmp_path / "out")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    weights = load_model(folders["bert"]).state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("[MASK]", 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM.from_pretrained('out')" in card


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {}),
        ("bert", {"type_vocab_size": 3, "vocab_size": 500, "tie_word_embeddings": False}),
        ("roberta", {}),
        ("modernbert", {}),
        ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}),
    ],
)
def test_a_configuration_is_counted_as_it_is_built(name, changes):
    config = ModelConfig(hf_config=config_of(name, **changes))
    model = build_model(config)
    assert config.parameter_count() == sum(weight.numel() for weight in model.parameters())
    assert not config.uncounted


def test_the_counts_of_published_encoders():
    bert = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 30522, "hidden_size": 768}
    bert |= {
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    }
    counts = count_encoder(bert, 30522)
    assert counts.parameters == 109_514_298
    # 6 x (109,514,298 - 514 x 768 of positions and types) + 12 layers x 12 x 768 x 512 tokens
    assert counts.flops_per_token(512) == 6 * (109_514_298 - 514 * 768) + 12 * 12 * 768 * 512
    modernbert = bert | {"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "vocab_size": 50368}
    modernbert |= {"num_hidden_layers": 22, "intermediate_size": 1152, "max_position_embeddings": 8192}
    counts = count_encoder(modernbert, 50368)
    assert counts.parameters == 149_655_232  # ModernBERT-base
    assert counts.windows == {None: 8, 128: 14}
    for changes in ({"model_type": "electra"}, {"type_vocab_size": "two"}, {"layer_types": 3}, {"hidden_size": None}):
        assert count_encoder({**bert, **changes}, 30522) is None
