"""TRL's SFTTrainer with a warmup: packing "bfd" (padding-free), "wrapped" and none, by the batches that it trains on."""

import pytest
import torch
from helpers.settings import changed

pytest.importorskip("trl")

from helpers.hf import losses, rates
from helpers.sft import sft_trainer

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.integrations.transformers import warm_up


@pytest.fixture(scope="module")
def run(tiny_run):
    return changed(tiny_run, data__leftovers="recycle", training__train_tokens=4000)


@pytest.fixture(scope="module", params=["wrapped", "bfd", None])
def trained(run, request, tmp_path_factory):
    """A run with packing, or without, that evaluates and leaves checkpoint-10; and its strategy."""
    folder = tmp_path_factory.mktemp("trl")
    saved = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 5}
    trainer = sft_trainer(folder, run, request.param, **saved)
    trainer.train()
    return trainer, request.param


def by_step(trainer):
    """The micro-batches of each step."""
    return [
        [inputs for at, inputs, _ in trainer.trained if at == step] for step in range(1, trainer.state.global_step + 1)
    ]


def test_each_step_has_its_length_and_its_rate(trained):
    trainer, strategy = trained
    plan = trainer.plan
    assert trainer.state.global_step == plan.steps
    assert rates(trainer) == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]
    for step, batches in enumerate(by_step(trainer), start=1):
        if strategy == "bfd":
            longest = max(int(inputs["position_ids"].max()) + 1 for inputs in batches)
        else:
            longest = max(inputs["input_ids"].shape[1] for inputs in batches)
        assert longest == plan.seqlen(step)
    if strategy == "wrapped":
        assert len(by_step(trainer)[0]) == 1  # balanced: 8 rows of 8 tokens are as many as 2 of 32


def test_evaluation_is_at_full_length(trained):
    trainer, strategy = trained
    if strategy == "bfd":
        assert max(trainer.evaluated) > 32  # 8 rows of 32 tokens side by side
    else:
        assert max(trainer.evaluated) == 32


PACKED = pytest.mark.parametrize("trained", ["wrapped", "bfd"], indirect=True)


@PACKED
def test_the_rows_are_those_of_the_trainer_without_a_warmup(trained, tmp_path):
    trainer, strategy = trained
    plain = sft_trainer(tmp_path, None, strategy, max_steps=trainer.plan.steps)
    plain.train()
    for step, (ours, theirs) in enumerate(zip(by_step(trainer), by_step(plain), strict=True), start=1):
        whole = torch.cat([inputs["input_ids"].flatten() for inputs in theirs])
        if strategy == "bfd":  # no token is lost
            assert torch.equal(torch.cat([inputs["input_ids"].flatten() for inputs in ours]), whole), step
        else:
            rows = whole.reshape(8, 32)[:, : trainer.plan.seqlen(step)]
            assert torch.equal(torch.cat([inputs["input_ids"] for inputs in ours]), rows), step


def test_the_counted_tokens_are_the_targets_of_the_step(trained):
    trainer, strategy = trained
    for step, batches in enumerate(by_step(trainer), start=1):
        counted = {items for at, _, items in trainer.trained if at == step}
        if strategy == "bfd":
            targets = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in batches)
        else:
            targets = sum(int((inputs["shift_labels"] != -100).sum()) for inputs in batches)
        assert counted == {targets}
        if strategy == "wrapped" and trainer.plan.seqlen(step) < 32:
            assert targets == 8 * trainer.plan.seqlen(step)


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning"
)  # more workers than this machine has cores
@PACKED
def test_resume_mid_warmup_is_bit_identical(trained, run, tmp_path):
    trainer, strategy = trained
    resumed = sft_trainer(tmp_path, run, strategy, dataloader_num_workers=4)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-10")
    assert trainer.plan.seqlen(10) < 32
    assert losses(resumed) == losses(trainer)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@pytest.mark.parametrize("trained", ["bfd"], indirect=True)
def test_padding_free_pieces_do_not_see_each_other(trained):
    trainer, _ = trained
    for _, inputs, _ in trainer.trained:
        positions = inputs["position_ids"][0]
        starts = (positions == 0).nonzero().flatten().tolist()
        pieces = [positions[start:end] for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
        assert all(piece.tolist() == list(range(len(piece))) for piece in pieces)


def test_padding_free_packing_needs_the_method_that_counts_its_tokens(run, tmp_path):
    truncated = changed(run, data=None, model=None)
    window = changed(truncated, curriculum_learning__method="window")
    with pytest.raises(ConfigError, match=r'curriculum_learning.method: .*set "window"'):
        warm_up(sft_trainer(tmp_path, None, "bfd", max_steps=1), truncated)
    with pytest.raises(ConfigError, match='"window" needs padding-free batches'):
        warm_up(sft_trainer(tmp_path, None, None, max_steps=1), window)
