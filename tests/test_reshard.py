"""Checkpoints continued under other ZeRO stages, on other numbers of ranks: the same state to the last bit, the same run.

The launched script is this file: two ranks train and save, three continue each checkpoint.
"""

import copy
import hashlib
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from helpers.parts import Part, do_parts, launch_parts
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum import CheckpointError, initialize
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.models.gpt2 import build_gpt2
from seqlen_curriculum.training.build import model_writer
from seqlen_curriculum.training.checkpoint import Checkpoints
from seqlen_curriculum.training.reshard import Span, _scalar, spans_of_parameters, take


def test_spans_of_parameters_worked_out_by_hand():
    shapes = [{"a": (5,), "b": (1,)}, {"c": (2, 3)}]  # shares of 2, 1 and 2 elements on three ranks
    assert spans_of_parameters(shapes, 0, 3) == [Span("a", 0, 2, 0, 0), Span("b", 0, 1, 0, 2), Span("c", 0, 2, 1, 0)]
    assert spans_of_parameters(shapes, 2, 3) == [Span("a", 4, 1, 0, 0), Span("b", 2, 0, 0, 2), Span("c", 4, 2, 1, 0)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9))
def test_any_shares_are_taken_from_any_others(numels, saved_ranks, ranks):
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
    with pytest.raises(ValueError, match="shards contain 3 of 4 elements"):
        take([(0, torch.zeros(3)), (5, torch.zeros(2))], 0, torch.zeros(4))


def test_a_count_stays_whole_and_a_product_stays_a_fraction():
    assert [_scalar(value) for value in (torch.tensor(3.0), 3, torch.tensor(0.5), "x")] == [3, 3, 0.5, "x"]


ROWS, SAVED, LAST = 12, 3, 6  # rows divide over 1, 2 and 3 ranks; saved in the middle of the warmup
RUN = {
    "train_batch_size": ROWS,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "gradient_clipping": 0.5,
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 4,
        "max_difficulty": 16,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 6, "difficulty_step": 4},
    },
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 5, "min_lr": 1e-3}},
    "training": {"train_tokens": 1000},
}
SETTINGS = {
    "fp32": {},
    "fp32 WarmupLR": {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5}}},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 15, "hysteresis": 1}},
    "fp16 skipping": {"fp16": {"enabled": True, "initial_scale_power": 40}},  # no step is taken, so there is no state
}


def config(precision, kind):
    run = {**copy.deepcopy(RUN), **SETTINGS[precision], "zero_optimization": {"stage": int(kind[0])}}
    if "offloaded" in kind:
        run["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if "fused" in kind:
        del run["optimizer"]["params"]["torch_adam"]
    if "robin" in kind:
        run["zero_optimization"]["round_robin_gradients"] = True
    if "sums" in kind:
        run["data_types"] = {"grad_accum_dtype": "fp32"}
    return run


def engine_for(precision, kind, seed):
    torch.manual_seed(seed)
    # Odd sizes, so that shares end inside parameters and are padded.
    sizes = {"num_layers": 2, "hidden_size": 10, "num_attention_heads": 2, "vocab_size": 101}
    model = build_gpt2(ModelConfig(max_position_embeddings=16, **sizes))
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config(precision, kind))
    return engine


def train(engine, last):
    """Each step's loss, length and rate up to step ``last``. In fp16 the first one overflows and is skipped."""
    seen = []
    while engine.global_steps < last:
        step = engine.global_steps + 1
        seqlen = engine.curriculum_scheduler.update_difficulty(step)
        tokens = torch.randint(0, 101, (ROWS, seqlen + 1), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        total = torch.zeros((), dtype=torch.float64)
        for micro in mine.split(2):
            loss = engine(micro[:, :-1], micro[:, 1:])
            total += loss.detach() * len(micro) / ROWS
            engine.backward(loss * 2**9 if step == 1 and engine.fp16_enabled() else loss)
            rate = engine.get_lr()[0]
            engine.step()
        dist.all_reduce(total)
        seen.append((float(total), seqlen, rate))
    return seen


def state(engine):
    """Everything that a step changes: digests of weights and optimizer state, counters, the loss scale."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    states = ("exp_avg", "exp_avg_sq") if base.state else ()
    if states and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed would at the first step
    digests = {name: hashlib.sha256() for name in ("low", "fp32", *states)}
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            tensors = {"low": parameter.detach().float().clone()}
        if engine.zero_optimization_stage():
            tensors["fp32"] = safe_get_full_fp32_param(parameter)
            tensors |= {key: safe_get_full_optimizer_state(parameter, key) for key in states}
        elif parameter in base.state:  # not so in half precision, where stage 0 is refused
            tensors |= {"fp32": parameter.detach(), **{key: base.state[parameter][key] for key in states}}
        for key, tensor in tensors.items():
            digests[key].update(tensor.float().numpy().tobytes())
    scaler = getattr(optimizer, "loss_scaler", None)
    scaling = vars(scaler) if scaler and scaler.dynamic else {}
    return {
        **{key: digest.hexdigest() for key, digest in digests.items()},
        "steps": sorted({int(own["step"]) for own in base.state.values()}),
        "counters": [engine.global_steps, engine.global_samples, engine.skipped_steps],
        "scaler": {key: value for key, value in scaling.items() if isinstance(value, (int, float))},
    }


def checkpoints(folder, precision, kind):
    """Those of one kind of run: what the kinds have in common is the run, and each has a folder of its own."""
    (folder / precision / kind).mkdir(parents=True, exist_ok=True)
    return Checkpoints(folder / precision / kind, 1, {"precision": precision})


def save(folder, precision, kind):
    """Train to the middle of the warmup and save; the state there, and how the run goes on."""
    engine = engine_for(precision, kind, seed=0)
    train(engine, SAVED)
    checkpoints(Path(folder), precision, kind).save(engine, SAVED, partial(model_writer, engine.module))
    return {"state": state(engine), "steps": train(engine, LAST)}


def resume(folder, precision, saved, kind):
    """Continue what ``saved`` has saved; the same of it, or the refusal."""
    engine = engine_for(precision, kind, seed=1)  # other weights: all must come from the checkpoint
    ours = checkpoints(Path(folder), precision, saved)
    try:
        ours.load(engine, ours.find("auto"))
    except CheckpointError as error:
        return {"refusal": str(error)}
    return {"state": state(engine), "steps": train(engine, LAST)}


# Precision, and what saves and what continues: a stage, "offloaded" to the CPU, with DeepSpeed's "fused" Adam (its count of
# steps is no tensor), or with "fp32 sums" of bf16 gradients (at stage 1 another optimizer class of DeepSpeed's).
STAGES = [("0", "1"), ("0", "3"), ("1", "0"), ("1", "2"), ("1", "3"), ("2", "2"), ("3", "0"), ("3", "2"), ("3", "3")]
# Stages 1 and 2 save the same files and read them alike, so these are a soak test.
MORE_STAGES = [("0", "2"), ("1", "1"), ("2", "0"), ("2", "1"), ("2", "3"), ("3", "1")]
SHARDED = [("1", "2"), ("2", "3"), ("3", "1")]
OTHERS = [("2 offloaded", "3"), ("3", "3 offloaded"), ("3 offloaded", "1")]
MIXES = [
    *(("fp32", *pair) for pair in STAGES + OTHERS),
    *(("bf16", *pair) for pair in [*SHARDED, ("1 fp32 sums", "3 fp32 sums"), ("2 fp32 sums", "1 fp32 sums")]),
    *(("fp16", *pair) for pair in SHARDED),
    ("fp32 WarmupLR", "2", "3"),
    ("fp16 skipping", "1", "3"),
    ("fp16 skipping", "3", "2"),
]
# Apart, because DeepSpeed compiles its Adam for minutes.
FUSED = [("fp32", "3 offloaded", "1 fused"), ("fp32", "1 fused", "2 offloaded")]
REFUSED = [("bf16", "0", "1"), ("bf16", "1", "0")]
ROUND_ROBIN = ("fp32", "2", "2 round robin")


def needs(precision, *kinds):
    """Capabilities: the one of the precision; DeepSpeed's own Adam is compiled."""
    compiled = any("fused" in kind for kind in kinds)
    return (*[word for word in ("bf16", "fp16") if word in precision], *(["compiler"] if compiled else []))


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    return resharded(tmp_path_factory.mktemp("reshard"), [*MIXES, *REFUSED, ROUND_ROBIN])


def resharded(folder, mixes):
    """What two ranks saved, by precision and kind, and how three ranks continued under other stages, by mix."""
    saves = [
        Part(
            f"{precision} {kind}",
            {"scenario": "save", "folder": str(folder), "precision": precision, "kind": kind},
            needs(precision, kind),
        )
        for precision, kind in sorted({(precision, saved) for precision, saved, _ in mixes})
    ]
    resumes = [
        Part(
            " to ".join(mix),
            {
                "scenario": "resume",
                "folder": str(folder),
                **dict(zip(("precision", "saved", "kind"), mix, strict=True)),
            },
            needs(*mix),
            after=f"{mix[0]} {mix[1]}",
        )
        for mix in mixes
    ]
    results = launch_parts(folder, __file__, saves, ranks=2)
    return launch_parts(folder, __file__, resumes, ranks=3, results=results)


# Of losses after steps whose sums over ranks were rounded.
TOLERANCES = {"fp32": 1e-5, "fp32 WarmupLR": 1e-5, "bf16": 1e-3, "fp16": 1e-3, "fp16 skipping": 1e-6}


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(mix).replace(" ", "_"))
def test_continues_on_more_ranks_under_another_stage(seen, mix):
    assert_continues(seen, mix)


@pytest.mark.slow
def test_continues_under_the_stages_that_are_left(tmp_path):
    mixes = [("fp32", *pair) for pair in MORE_STAGES]
    seen = resharded(tmp_path, mixes)
    for mix in mixes:
        assert_continues(seen, mix)


@pytest.mark.slow
def test_deepspeeds_own_adam_continues_and_is_continued(tmp_path):
    seen = resharded(tmp_path, FUSED)
    for mix in FUSED:
        assert_continues(seen, mix)


def assert_continues(seen, mix):
    precision, saved, _ = mix
    expected, resumed = seen[f"{precision} {saved}"], seen[" to ".join(mix)]
    assert resumed["state"] == expected["state"]
    assert resumed["state"]["counters"][:2] == [3, 3 * 12]
    losses, lengths, rates = zip(*resumed["steps"], strict=True)
    expected_losses, expected_lengths, expected_rates = zip(*expected["steps"], strict=True)
    assert lengths == expected_lengths
    assert rates == expected_rates
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-6)  # before any sum over ranks
    assert losses == pytest.approx(expected_losses, rel=TOLERANCES[precision])


def test_what_was_compared_has_a_skipped_step_and_a_lowered_loss_scale(seen):
    state = seen["fp16 1"]["state"]
    assert state["counters"] == [3, 36, 1]
    assert state["steps"] == [2]
    assert state["scaler"]["cur_scale"] == 2**14
    assert seen["fp16 skipping 1"]["state"]["steps"] == []


@pytest.mark.parametrize(("precision", "saved", "stage"), REFUSED)
def test_half_precision_and_stage_0_do_not_mix(seen, precision, saved, stage):
    refusal = seen[f"{precision} to {saved} to {stage}"]["refusal"]
    assert f"saved under ZeRO stage {saved}, which in half precision can't resume under stage {stage}" in refusal
    assert f"set zero_optimization.stage to {saved}" in refusal


def test_shards_in_an_order_of_their_own_are_refused(seen):
    refusal = seen["fp32 to 2 to 2 round robin"]["refusal"]
    assert "zero_optimization.round_robin_gradients changes the order of shards" in refusal
    assert "resume with the saved zero_optimization {'stage': 2} on 2 data-parallel ranks" in refusal


if __name__ == "__main__":
    deepspeed.init_distributed()
    scenarios = {"save": save, "resume": resume}
    do_parts(lambda scenario, **arguments: scenarios[scenario](**arguments))
    dist.destroy_process_group()
