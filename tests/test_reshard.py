"""Checkpoints continued under other ZeRO stages, on other numbers of ranks: the same state to the last bit, the same run."""

import json

import pytest
from conftest import launch
from hypothesis import given
from hypothesis import strategies as st


def test_spans_of_parameters_worked_out_by_hand():
    from seqlen_curriculum.training.reshard import Span, spans_of_parameters

    shapes = [{"a": (5,), "b": (1,)}, {"c": (2, 3)}]  # shares of 2, 1 and 2 elements on three ranks
    assert spans_of_parameters(shapes, 0, 3) == [Span("a", 0, 2, 0, 0), Span("b", 0, 1, 0, 2), Span("c", 0, 2, 1, 0)]
    assert spans_of_parameters(shapes, 2, 3) == [Span("a", 4, 1, 0, 0), Span("b", 2, 0, 0, 2), Span("c", 4, 2, 1, 0)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9))
def test_any_shares_are_taken_from_any_others(numels, saved_ranks, ranks):
    import torch

    from seqlen_curriculum.training.reshard import spans_of_parameters, take

    shapes = [{f"p{number}": (numel,) for number, numel in enumerate(numels)}]
    weights = {name: torch.arange(numel) + 100 * number for number, (name, (numel,)) in enumerate(shapes[0].items())}
    pieces = {name: [] for name in weights}
    for rank in range(saved_ranks):
        for span in spans_of_parameters(shapes, rank, saved_ranks):
            pieces[span.name].append((span.first, weights[span.name][span.first : span.first + span.numel]))
    for rank in range(ranks):
        for span in spans_of_parameters(shapes, rank, ranks):
            target = torch.full((span.numel,), -1)
            take(pieces[span.name], span.first, target)
            assert target.tolist() == weights[span.name][span.first : span.first + span.numel].tolist()


def test_a_missing_share_is_an_error():
    import torch

    from seqlen_curriculum.training.reshard import take

    with pytest.raises(ValueError, match="of 4 elements of a parameter the shards hold 3"):
        take([(0, torch.zeros(3)), (5, torch.zeros(2))], 0, torch.zeros(4))


# Precision, and what saves and what continues: a stage, "offloaded" to the CPU, with DeepSpeed's "fused" Adam (its count of
# steps is no tensor), or with "fp32 sums" of bf16 gradients (at stage 1 another optimizer class of DeepSpeed's).
STAGES = [(f"{saved}", f"{stage}") for saved in range(4) for stage in range(4) if (saved, stage) != (0, 0)]
SHARDED = [("1", "2"), ("2", "3"), ("3", "1")]
OTHERS = [("2 offloaded", "3"), ("3", "3 offloaded"), ("3 offloaded", "1 fused"), ("1 fused", "2 offloaded")]
MIXES = [
    *(("fp32", *pair) for pair in STAGES + OTHERS),
    *(("bf16", *pair) for pair in [*SHARDED, ("1 fp32 sums", "3 fp32 sums"), ("2 fp32 sums", "1 fp32 sums")]),
    *(("fp16", *pair) for pair in SHARDED),
    ("fp32 WarmupLR", "2", "3"),
    ("fp16 skipping", "1", "3"),
    ("fp16 skipping", "3", "2"),
]
REFUSED = [("bf16", "0", "1"), ("bf16", "1", "0")]
ROUND_ROBIN = ("fp32", "2", "2 round robin")


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    """What two ranks saved and how they went on, and how three ranks continued under other stages."""
    folder = tmp_path_factory.mktemp("reshard")
    (folder / "mixes.json").write_text(json.dumps([*MIXES, *REFUSED, ROUND_ROBIN]))
    for mode, ranks in (("save", 2), ("resume", 3)):
        status, output = launch(folder / f"{mode}.log", "tests/launched_reshard.py", mode, folder, ranks=ranks)
        assert status == 0, output
    return {mode: json.loads((folder / f"{mode}.json").read_text()) for mode in ("save", "resume")}


# Of losses after steps whose sums over ranks were rounded.
TOLERANCES = {"fp32": 1e-5, "fp32 WarmupLR": 1e-5, "bf16": 1e-3, "fp16": 1e-3, "fp16 skipping": 1e-6}


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(mix).replace(" ", "_"))
def test_continues_on_more_ranks_under_another_stage(seen, mix):
    precision, saved, _ = mix
    expected, resumed = seen["save"][f"{precision} {saved}"], seen["resume"][" to ".join(mix)]
    assert resumed["state"] == expected["state"]
    assert resumed["state"]["counters"][:2] == [3, 3 * 12]
    losses, lengths, rates = zip(*resumed["steps"], strict=True)
    expected_losses, expected_lengths, expected_rates = zip(*expected["steps"], strict=True)
    assert lengths == expected_lengths
    assert rates == expected_rates
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-6)  # before any sum over ranks
    assert losses == pytest.approx(expected_losses, rel=TOLERANCES[precision])


def test_what_was_compared_has_a_skipped_step_and_a_lowered_loss_scale(seen):
    state = seen["save"]["fp16 1"]["state"]
    assert state["counters"] == [3, 36, 1]
    assert state["steps"] == [2]
    assert state["scaler"]["cur_scale"] == 2**14
    assert seen["save"]["fp16 skipping 1"]["state"]["steps"] == []


@pytest.mark.parametrize(("precision", "saved", "stage"), REFUSED)
def test_half_precision_and_stage_0_do_not_mix(seen, precision, saved, stage):
    refusal = seen["resume"][f"{precision} to {saved} to {stage}"]["refusal"]
    assert f"saved under ZeRO stage {saved}, which in half precision can't continue under stage {stage}" in refusal
    assert f"set zero_optimization.stage to {saved}" in refusal


def test_shards_in_an_order_of_their_own_are_refused(seen):
    refusal = seen["resume"]["fp32 to 2 to 2 round robin"]["refusal"]
    assert "zero_optimization.round_robin_gradients lays shards out in an order of its own" in refusal
    assert "continue with the saved zero_optimization {'stage': 2} on 2 data-parallel ranks" in refusal


def test_a_count_stays_whole_and_a_product_stays_a_fraction():
    import torch

    from seqlen_curriculum.training.reshard import _scalar

    assert [_scalar(value) for value in (torch.tensor(3.0), 3, torch.tensor(0.5), "x")] == [3, 3, 0.5, "x"]
