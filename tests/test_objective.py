"""Masks of rows: counts, special tokens, shares, and their dependence on seed, step and row alone. No torch."""

import shutil

import numpy as np
import pytest
from helpers.encoders import END, write_description, write_tokenizer
from helpers.settings import changed

from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.data.mask_tokens import open_objective
from seqlen_curriculum.data.objective import Masking, NextToken
from seqlen_curriculum.errors import ConfigError

SPECIAL = (0, 1, 2)  # 2 ends documents
MASK = 3
V = 512
PINNED = [[2, 5, 8, 12, 16, 18]], [[3, 3, 3, 3, 279, 3]]


def masking(**changes):
    return Masking(
        **{"seed": 1234, "probability": 0.15, "mask_id": MASK, "special_ids": SPECIAL, "vocab_size": V} | changes
    )


def rows_of(count, seqlen, seed=0):
    """Return random tokens, of which about 1 in 40 is special."""
    random = np.random.default_rng(seed)
    tokens = random.integers(4, V, (count, seqlen), dtype=np.uint16)
    return np.where(random.random(tokens.shape) < 0.025, random.integers(0, 3, tokens.shape), tokens).astype(np.uint16)


def masked(tokens, step=1, first_row=0, **changes):
    """Return inputs (B, S), positions (B, M) and labels (B, M)."""
    inputs, targets = masking(**changes).of_step(tokens, tokens, step, first_row)
    return inputs, targets[:, 0], targets[:, 1]


# round(0.15 x seqlen), at least 1: 0.15, 0.45, 1.2, 4.8, 19.2 and 76.8; ModernBERT's 0.3 x 8 is 2.4.
@pytest.mark.parametrize(
    ("seqlen", "probability", "targets"),
    [
        (1, 0.15, 1),
        (3, 0.15, 1),
        (8, 0.15, 1),
        (32, 0.15, 5),
        (128, 0.15, 19),
        (512, 0.15, 77),
        (8, 0.3, 2),
        (4, 0.99, 4),
    ],
)
def test_every_row_has_the_same_number_of_distinct_targets(seqlen, probability, targets):
    tokens = rows_of(16, seqlen) | 4  # none is special: 4 and above
    inputs, positions, labels = masked(tokens, probability=probability)
    assert positions.shape == labels.shape == (16, targets)
    assert inputs.dtype == positions.dtype == labels.dtype == np.int64
    assert (np.diff(positions, axis=1) > 0).all()  # ascending, each once
    assert (labels == np.take_along_axis(tokens, positions, axis=1)).all()
    assert masking(probability=probability).target_shape(16, seqlen) == (16, 2, targets)


def test_other_tokens_are_unchanged_and_special_tokens_are_never_predicted():
    tokens = rows_of(64, 256)
    inputs, positions, labels = masked(tokens)
    changed = np.zeros(tokens.shape, bool)
    np.put_along_axis(changed, positions, True, axis=1)
    assert (inputs[~changed] == tokens[~changed]).all()
    assert not np.isin(labels, (*SPECIAL, MASK)).any()
    # A random token is never special either, which would end a document.
    assert (np.isin(inputs, SPECIAL) == np.isin(tokens, SPECIAL)).all()


def test_the_shares_are_those_of_bert():
    tokens = rows_of(2000, 128)
    inputs, positions, labels = masked(tokens)
    read = np.take_along_axis(inputs, positions, axis=1)
    count = labels.size  # 38,000
    # Deviations of the shares: sqrt(0.8 x 0.2 / 38000) = 0.002 and 0.0015. A random token is the old one in 1 of 508.
    assert (read == MASK).mean() == pytest.approx(0.8, abs=4 * 0.002)
    assert (read == labels).mean() == pytest.approx(0.1 + 0.1 / 508, abs=4 * 0.0015)
    random = read[(read != MASK) & (read != labels)]
    assert len(np.unique(random)) > 500  # all over the vocabulary
    # Every position is equally likely: 38,000 / 128 = 297 targets each, with a deviation of 17.
    per_position = np.bincount(positions.ravel(), minlength=128)
    assert per_position.sum() == count
    assert abs(per_position - count / 128).max() < 5 * 17


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_have_the_masks_of_one(ranks):
    tokens = rows_of(16, 40)
    whole = masking().of_step(tokens, tokens, 7, 0)
    count = 16 // ranks
    parts = [masking().of_step(tokens[n : n + count], tokens[n : n + count], 7, n) for n in range(0, 16, count)]
    for one, joined in zip(whole, (np.concatenate(part) for part in zip(*parts, strict=True)), strict=True):
        assert (one == joined).all()


def test_masks_differ_by_seed_step_and_row():
    tokens = np.tile(rows_of(1, 200, seed=1), (4, 1))
    places = [masked(tokens, step, **changes)[1] for step, changes in [(1, {}), (2, {}), (1, {"seed": 5})]]
    each = {tuple(row) for one in places for row in one.tolist()}
    assert len(each) == 12


def test_masks_are_the_same_in_every_version():
    """A run that resumes after an upgrade of numpy continues with the same masks."""
    tokens = np.arange(4, 24).reshape(1, 20)
    inputs, positions, _ = masked(tokens, step=3, first_row=5, probability=0.3)
    assert (positions.tolist(), np.take_along_axis(inputs, positions, 1).tolist()) == PINNED


def test_evaluations_have_fixed_masks_by_sample():
    tokens, ids = rows_of(6, 33), np.array([3, 17, 30, 31, 40, 99])
    inputs, targets = masking().of_samples(tokens, ids)
    assert inputs.shape == (6, 32)  # the last of 33 tokens is the first of the next sample
    for seed, order in ((1234, [5, 0, 2]), (99, [1])):  # in any order, and for runs of any seed
        again = masking(seed=seed).of_samples(tokens[order], ids[order])
        assert (again[0] == inputs[order]).all()
        assert (again[1] == targets[order]).all()
    training, _ = masking().of_step(tokens[:, :-1], tokens[:, 1:], 1, 0)
    assert (training != inputs).any()


def test_a_row_of_few_ordinary_tokens_repeats_them():
    tokens = np.array([[2, 9, 2, 2, 2, 8, 2, 2], [2] * 8])
    inputs, positions, labels = masked(tokens, probability=0.5)
    assert positions[0].tolist() == [1, 1, 5, 5]
    assert labels[0].tolist() == [9, 9, 8, 8]
    assert inputs[1].tolist() == [2] * 8  # nothing but ends of documents: they are kept
    assert labels[1].tolist() == [2] * 4


def test_the_mask_token_may_exceed_the_type_of_the_corpus():
    tokens = np.full((8, 100), 200, np.uint8)
    inputs, _, _ = masked(tokens, vocab_size=1000, mask_id=999)
    assert inputs.max() == 999


def test_next_tokens_are_unchanged():
    tokens = rows_of(4, 9)
    inputs, targets = NextToken().of_samples(tokens, np.arange(4))
    assert (inputs == tokens[:, :-1]).all()
    assert (targets == tokens[:, 1:]).all()
    assert NextToken().target_shape(4, 8) == (4, 8)


@pytest.fixture
def run(tiny_run, corpus, tmp_path):
    """Return a masked run of an encoder on a corpus without a tokenizer."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"bytes{suffix}")
    run = {**tiny_run, "model": {"hf_checkpoint": str(write_description(tmp_path / "bert"))}}
    run["data"] = {**run["data"], "train": [str(tmp_path / "bytes")]}
    run["training"] = {**run["training"], "objective": "masked", "mask_token_id": 511}
    return run


def test_a_masked_run_is_planned(run, tiny_run):
    config = RunConfig.from_dict(run)
    assert config.plan.timeline.consumed_tokens(1) == 8 * 8  # every token of the 8 rows of 8 counts
    assert config.settings()["training.objective"] == "masked"
    assert config.settings()["training.mlm_probability"] == 0.15
    assert "training.objective" not in RunConfig.from_dict(tiny_run).settings()  # as in older checkpoints
    again = RunConfig.from_dict(config.as_file())
    assert again.settings() == config.settings()


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        (
            {"training__objective": "causal", "training__mask_token_id": None},
            ['training.objective: "causal"', "encoder"],
        ),
        ({"training__objective": "mlm"}, ["training.objective", "'causal' or 'masked'"]),
        ({"training__objective": "causal"}, ["mask_token_id 511 is not used", 'set objective to "masked"']),
        ({"training__mlm_probability": 0}, ["training.mlm_probability", "0"]),
        ({"training__mlm_probability": 1}, ["training.mlm_probability", "1"]),
        ({"training__mlm_probability": 15}, ["training.mlm_probability", "15"]),
        ({"training__mask_token_id": 512}, ["training.mask_token_id: 512", "vocabulary of 512"]),
        ({"training__compile": True}, ["training.compile: true", "masked"]),
        ({"model__rope": {"theta": 1e6}}, ["model.rope", "masked", "remove it"]),
        ({"pipeline": {"stages": 2}}, ["pipeline.stages: 2", "masked", "set it to 1"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel.autotp_size: 2", "masked", "set it to 1"]),
        ({"sequence_parallel_size": 2}, ["sequence_parallel_size: 2", "masked", "set it to 1"]),
        ({"curriculum_learning__method": "window"}, ['curriculum_learning.method: "window"', "masked", '"segment"']),
        ({"model": {"preset": "tiny-200k"}}, ['training.objective: "masked"', "model.preset tiny-200k", "encoder"]),
    ],
)
def test_what_does_not_go_together_is_one_error(run, keys, messages):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(changed(run, **keys))
    (problem,) = error.value.problems
    for message in messages:
        assert message in problem


def test_a_folder_of_a_causal_model_is_refused(run, tmp_path):
    folder = write_description(tmp_path / "llama", "LlamaForCausalLM", "llama")
    with pytest.raises(ConfigError, match=f'"masked" needs an encoder, but model.hf_checkpoint {folder}'):
        RunConfig.from_dict(changed(run, model={"hf_checkpoint": str(folder)}))


def test_an_encoder_that_was_made_causal_is_refused(run, tmp_path):
    write_description(tmp_path / "bert", is_decoder=True)
    with pytest.raises(ConfigError, match=r"is_decoder is true in the config.json of model.hf_checkpoint"):
        RunConfig.from_dict(run)


def test_the_tokens_of_a_run_without_a_tokenizer(run):
    config = RunConfig.from_dict(run)
    masking = open_objective(config)
    assert (masking.mask_id, masking.special_ids) == (511, (END,))  # as config.json names it
    open_run_data(config)
    with pytest.raises(ConfigError, match=r"training.mask_token_id: required.*the run has no tokenizer"):
        open_run_data(RunConfig.from_dict(changed(run, training__mask_token_id=None)))


@pytest.mark.parametrize("mask", ["[MASK]", "<mask>"])
def test_the_tokens_of_a_tokenizer(run, tmp_path, mask):
    write_tokenizer(tmp_path / "bytes.tokenizer.json", mask, special=("<end>", "[CLS]"))
    config = RunConfig.from_dict(changed(run, training__mask_token_id=None, training__mlm_probability=0.3))
    masking = open_objective(config)
    assert (masking.mask_id, masking.special_ids, masking.probability) == (2, (0, 1, 2), 0.3)
    with pytest.raises(
        ConfigError, match=r"training.mask_token_id: 511 is not the mask token of .*, 2; remove the key"
    ):
        open_objective(RunConfig.from_dict(run))


def test_a_mask_token_of_another_name_is_read_from_the_folder(run, tmp_path):
    write_tokenizer(tmp_path / "bert/tokenizer.json", "<|gap|>")
    (tmp_path / "bert/tokenizer_config.json").write_text('{"mask_token": {"content": "<|gap|>"}}')
    assert open_objective(RunConfig.from_dict(changed(run, training__mask_token_id=None))).mask_id == 1


def test_a_tokenizer_without_a_mask_token_is_refused(run, tmp_path):
    write_tokenizer(tmp_path / "bytes.tokenizer.json", mask=None)
    with pytest.raises(ConfigError, match=r"training.mask_token_id: required.*tokenizer .* has no mask token"):
        open_run_data(RunConfig.from_dict(changed(run, training__mask_token_id=None)))
    assert open_objective(RunConfig.from_dict(run)).mask_id == 511
