"""Megatron's batches cut to the step's length, and its real GPTModel, schedules and learning rate on two CPU ranks.

This module is also the launched script.
"""

import pytest
import torch
from helpers.megatron import BATCH, FULL, LR, batch_of, megatron_args
from helpers.parts import Part, do_parts, launch_parts
from helpers.settings import changed
from torch.utils.data import DataLoader

from seqlen_curriculum.data.from_config import open_training_data
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.integrations.megatron import MegatronRows, cut_tensors, token_rate, warm_up
from seqlen_curriculum.integrations.plan import TrainerPlan


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) if isinstance(left[name], torch.Tensor) else left[name] is right[name]
        for name in left
    )


@pytest.fixture(scope="module")
def tiny_run(tiny_run):
    return changed(tiny_run, optimizer=None)  # Megatron's arguments have the rate


@pytest.mark.parametrize(
    "missing",
    [(), ("attention_mask",), ("tokens", "position_ids"), ("labels", "loss_mask")],
    ids=["all", "no_mask", "last_stage", "first_stage"],
)
def test_a_cut_batch_is_that_of_short_rows(missing):
    full, none = batch_of(), dict.fromkeys(missing)
    cut = cut_tensors({**full, **none}, 8, tp=2, cp=2)
    assert same(cut, batch_of(seqlen=8, **none))
    assert all(value.is_contiguous() for value in cut.values() if value is not None)
    assert full["tokens"].shape == (2, FULL)


@pytest.mark.parametrize("seqlen", [FULL, FULL + 8])
def test_full_length_and_a_middle_stage_are_left_as_they_are(seqlen):
    assert same(cut_tensors(batch_of(), seqlen), batch_of())
    empty = dict.fromkeys(batch_of())
    assert cut_tensors(empty, 8) == empty


def test_positions_that_restart_do_not_make_a_batch_padding_free():
    positions = torch.arange(FULL).remainder(5).expand(2, -1)
    cut = cut_tensors(batch_of(position_ids=positions, attention_mask=None), 8)
    assert cut["tokens"].shape == (2, 8)
    assert cut["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]] * 2


def bounds(*ends):
    """Megatron's bounds of documents: padded with the full length to one size for all rows."""
    return torch.tensor([[0, *ends] + [FULL] * (FULL - len(ends))], dtype=torch.int32)


def test_documents_end_at_the_length():
    packed = batch_of(rows=1, cu_seqlens=bounds(5, 9, 20), max_seqlen=torch.tensor([12], dtype=torch.int32))
    for length, ends, longest in [(8, [5, 8, 8], 5), (16, [5, 9, 16], 7), (24, [5, 9, 20, 24], 11)]:
        cut = cut_tensors(packed, length)
        assert cut["cu_seqlens"][0, 1 : len(ends) + 1].tolist() == ends
        assert cut["cu_seqlens"].max() == length
        assert cut["max_seqlen"].tolist() == [longest]
        assert cut["tokens"].shape == (1, length)
    middle_stage = {**dict.fromkeys(packed), "cu_seqlens": packed["cu_seqlens"], "max_seqlen": packed["max_seqlen"]}
    assert cut_tensors(middle_stage, 8)["max_seqlen"].tolist() == [5]
    with pytest.raises(DataError, match="cu_seqlens_padded"):
        cut_tensors({**packed, "cu_seqlens_padded": packed["cu_seqlens"]}, 8)


@pytest.mark.parametrize(
    ("seqlen", "tp", "cp", "multiple", "nearest"),
    [
        (12, 8, 1, 8, "8 and 16"),
        (12, 1, 4, 8, "8 and 16"),
        (4, 4, 2, 8, "8"),
        (12, 3, 4, 24, "24"),
        (10, 1, 2, 4, "8 and 12"),
    ],
)
def test_a_length_that_the_ranks_do_not_divide_is_refused_with_its_neighbours(seqlen, tp, cp, multiple, nearest):
    with pytest.raises(ConfigError) as error:
        cut_tensors(batch_of(), seqlen, tp, cp)
    assert f"length {seqlen} is not a multiple of {multiple}" in str(error.value)
    assert f"nearest to {seqlen}: {nearest})" in str(error.value)


def test_the_plan_sets_what_follows_from_it(tiny_run):
    args = megatron_args(pipeline_model_parallel_size=2)
    plan = warm_up(args, tiny_run)
    assert args.train_iters == plan.steps == TrainerPlan.of(tiny_run, global_batch=BATCH, max_lr=LR).steps
    assert args.variable_seq_lengths is True
    plan.check(args.sequence_length_warmup, 10)
    longer = changed(tiny_run, curriculum_learning__schedule_config__total_curriculum_step=40)
    with pytest.raises(CheckpointError, match="total_curriculum_step"):
        warm_up(megatron_args(), longer).check(args.sequence_length_warmup, 10)


def test_what_contradicts_the_plan_is_refused_before_training(tiny_run):
    parallel = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "context_parallel_size": 2}
    args = megatron_args(
        seq_length=64,
        rampup_batch_size=[2, 2, 100],
        train_samples=100,
        cuda_graph_impl="local",
        **parallel,
        pipeline_model_parallel_size=2,
        moe_token_dispatcher_type="allgather",
    )
    with pytest.raises(ConfigError) as error:
        warm_up(args, tiny_run)
    message = str(error.value)
    listed = (
        "--seq-length: 64, --rampup-batch-size, --train-samples, --cuda-graph-impl, --moe-token-disp, length 12 and"
    )
    for named in listed.split(", "):
        assert named in message
    assert len(error.value.problems) == 6
    assert args.train_iters == 1
    with pytest.raises(ConfigError, match="train_batch_size: 8 in the file, but the trainer has 16"):
        warm_up(megatron_args(global_batch_size=16), tiny_run)


def test_tensor_parallelism_without_sequence_parallelism_divides_no_length(tiny_run):
    warm_up(megatron_args(tensor_model_parallel_size=8), tiny_run)


def test_a_rate_needs_a_token_cosine(tiny_run):
    with pytest.raises(ConfigError, match="scheduler: TokenCosineLR, TokenLinearLR or TokenWSDLR is required"):
        token_rate(warm_up(megatron_args(), changed(tiny_run, scheduler=None)))


def test_the_rows_of_the_run(tiny_run):
    plan = warm_up(megatron_args(), changed(tiny_run, data__leftovers="recycle"))
    rows, data = MegatronRows(plan), open_training_data(plan.config)
    # Megatron's sampler gives rank r of 2 the samples from (2 m + r) * micro-batch on.
    order = [[range(first, first + 2) for first in range(2 * rank, len(rows), 4)] for rank in range(2)]
    loaders = [DataLoader(rows, batch_sampler=of_rank, num_workers=rank) for rank, of_rank in enumerate(order)]
    batches = [batch for both in zip(*loaders, strict=True) for batch in both]
    for step in range(1, plan.steps + 1):
        inputs, targets = data.read(step)
        part = batches[4 * step - 4 : 4 * step]
        assert torch.cat([batch["tokens"] for batch in part]).tolist() == inputs.tolist()
        assert torch.cat([batch["labels"] for batch in part]).tolist() == targets.tolist()
        assert all(batch["loss_mask"].sum() == batch["tokens"].numel() for batch in part)
        assert part[0]["position_ids"].tolist() == [list(range(plan.seqlen(step)))] * 2
    with pytest.raises(ConfigError, match="segment"):
        MegatronRows(warm_up(megatron_args(), changed(tiny_run, curriculum_learning__method="segment")))


@pytest.fixture(scope="module")
def seen(tiny_run, tmp_path_factory):
    run = changed(tiny_run, training__train_tokens=4000)
    parts = [
        Part("tensor_parallel", {"part": "cut_rows", "tp": 2}),
        Part("context_parallel", {"part": "sliced"}),
        Part("one", {"part": "train", "run": run, "pp": 1}),
        Part("pipeline", {"part": "train", "run": run, "pp": 2}),
    ]
    return launch_parts(tmp_path_factory.mktemp("megatron"), __file__, parts, ranks=2)


@pytest.fixture(scope="module")
def plan(tiny_run):
    return warm_up(megatron_args(), changed(tiny_run, training__train_tokens=4000))


def test_tensor_parallel_ranks_train_the_short_rows(seen):
    for seqlen, (as_short_rows, difference, shape) in seen["tensor_parallel"].items():
        assert shape == [2, int(seqlen)]
        assert as_short_rows
        assert difference < 1e-5  # to the full rows, whose first tokens see no later ones


def test_context_parallel_ranks_share_the_cut_row(seen):
    assert seen["context_parallel"] == [list(range(8))]


@pytest.mark.parametrize("part", ["one", "pipeline"])
def test_megatrons_schedule_trains_each_step_at_its_length_and_rate(seen, plan, part):
    trained, steps = seen[part], range(1, plan.steps + 1)
    assert trained["lengths"] == [plan.seqlen(step) for step in steps for _ in range(2)]
    assert trained["rates"] == [plan.learning_rate(step) for step in steps]
    assert trained["evaluated"] == [FULL] * 2 * (plan.steps // 8)
    assert trained["losses"][-1] < trained["losses"][0]
    assert trained["tokens"] == [plan.consumed_tokens(step) for step in steps]
    assert trained["tokens"][-1] == BATCH * sum(trained["lengths"][::2]) >= 4000


def test_a_pipeline_trains_as_one_rank_does(seen):
    assert seen["pipeline"]["losses"] == pytest.approx(seen["one"]["losses"], abs=1e-5)


def test_a_resumed_run_continues_mid_warmup(seen):
    whole, resumed = seen["one"], seen["one"]["resumed"]
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert resumed["rates"] == whole["rates"][-len(resumed["rates"]) :]
    assert resumed["lengths"] == whole["lengths"][2 * 6 :]


if __name__ == "__main__":
    from helpers.megatron import cut_rows, sliced, train

    torch.distributed.init_process_group("gloo")
    do_parts(lambda part, **given: {"cut_rows": cut_rows, "sliced": sliced, "train": train}[part](**given))
    torch.distributed.destroy_process_group()
