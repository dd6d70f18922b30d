"""Hugging Face's Trainer, TRL and Accelerate on two ranks: DDP, DeepSpeed's ZeRO 1 and 2, a resume from one rank on two.

This module is also the launched script.
"""

import importlib.util
import os

import pytest
from helpers.parts import Part, do_parts, launch_parts
from helpers.settings import changed

pytest.importorskip("accelerate")

RANKS = 2
ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
}
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def train_part(trainer="hf", **arguments):
    """Train on this rank with one of the trainers; return what all ranks saw together."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch import distributed as dist

    # Each part has an engine of its own. TrainingArguments with a deepspeed section leave it on in the environment.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert PartialState._shared_state == {}
    own = {"hf": train, "trl": train_trl, "accelerate": train_accelerate}[trainer](**arguments)
    gathered = [None] * RANKS
    dist.all_gather_object(gathered, own["batches"])
    return {**own, "batches": gathered}


def train(folder, run, resume=None, stage=None, accumulation=2, **changes):
    """Train on this rank with Hugging Face's Trainer, whose steps have 8 rows on all ranks."""
    import torch
    from helpers.hf import arguments, losses, tiny_llama
    from transformers import TrainerCallback

    from seqlen_curriculum.integrations.plan import TrainerPlan
    from seqlen_curriculum.integrations.torch_data import RunRows
    from seqlen_curriculum.integrations.transformers import SequenceLengthWarmupTrainer

    class Counted(SequenceLengthWarmupTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            tokens[self.state.global_step + 1] = int(num_items_in_batch)
            return super().training_step(model, inputs, num_items_in_batch)

    class Rates(TrainerCallback):
        def on_step_begin(self, *_, optimizer=None, **__):
            rates.append(optimizer.param_groups[0]["lr"])

    tokens, rates = {}, []
    deepspeed = {} if stage is None else {"deepspeed": {**ZERO, "zero_optimization": {"stage": stage}}}
    full = torch.arange(32)
    model = tiny_llama()
    trainer = Counted(
        model=model,
        args=arguments(folder, gradient_accumulation_steps=accumulation, **deepspeed, **changes),
        train_dataset=RunRows(TrainerPlan.of(run, global_batch=8, max_lr=5e-3)),
        eval_dataset=[{"input_ids": full, "labels": full}] * 4,
        curriculum=run,
        callbacks=[Rates()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "batches": [ids.tolist() for trains, ids in model.seen if trains],
        "evaluated": sorted({ids.shape[1] for trains, ids in model.seen if not trains}),
        "losses": losses(trainer),
        "rates": rates,
        "tokens": list(tokens.values()),
    }


def train_trl(folder, run, strategy, resume=None, accumulation=2, **changes):
    """Train on this rank with TRL's SFTTrainer."""
    from helpers.hf import losses, rates
    from helpers.sft import sft_trainer

    trainer = sft_trainer(folder, run, strategy, gradient_accumulation_steps=accumulation, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "batches": [inputs["input_ids"].tolist() for _, inputs, _ in trainer.trained],
        "tokens": list({step: items for step, _, items in trainer.trained}.values()),
        "evaluated": max(getattr(trainer, "evaluated", [0])),
        "losses": losses(trainer),
        "rates": rates(trainer),
    }


def train_accelerate(folder, run, **options):
    """Train on this rank in a loop of Accelerate."""
    from helpers import accelerate_loop

    return accelerate_loop.train(run, folder, **{"accumulation": 2, **options})


def by_step(batches, global_batch=8):
    """The rows of each step over all ranks, sorted, from the micro-batches of each rank."""
    rows = [[row for micro_batch in rank for row in micro_batch] for rank in batches]
    share = global_batch // len(batches)
    return [
        sorted(row for rank in rows for row in rank[start : start + share]) for start in range(0, len(rows[0]), share)
    ]


@pytest.fixture(scope="module")
def run(tiny_run):
    return changed(tiny_run, data__leftovers="recycle", training__train_tokens=4000)


@pytest.fixture(scope="module")
def plan(run):
    from seqlen_curriculum.integrations.plan import TrainerPlan

    return TrainerPlan.of(run, global_batch=8, max_lr=5e-3)


@pytest.fixture(scope="module")
def one_rank(run, tmp_path_factory):
    """The folder, and what each trainer saw on one rank in this process, with the same steps; each leaves checkpoint-10."""
    folder = tmp_path_factory.mktemp("one")
    saved = {"save_strategy": "steps", "save_steps": 10, "accumulation": 4}
    results = {
        "hf": train(folder / "hf", run, **saved),
        "accelerate": train_accelerate(folder / "accelerate", run, accumulation=4, save_after=10),
    }
    if importlib.util.find_spec("trl"):
        results |= {strategy: train_trl(folder / strategy, run, strategy, **saved) for strategy in ("wrapped", "bfd")}
    return folder, results


@pytest.fixture(scope="module")
def launched(run, one_rank, tmp_path_factory):
    folder, one = tmp_path_factory.mktemp("two"), one_rank[0]
    saved = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 10}
    ddp = {**saved, "dataloader_num_workers": 2}

    def part(name, into=None, after=None, **arguments):
        return Part(name, {"run": run, "folder": str(folder / (into or name)), **arguments}, after=after)

    def resumed(name, into, **arguments):
        return part(name, into, after=into, resume=str(folder / into / "checkpoint-10"), **arguments)

    parts = [
        part("ddp", **ddp),
        part("from_one", resume=str(one / "hf" / "checkpoint-10")),
        part("zero1", stage=1, **ddp),
        part("zero2", stage=2, **ddp),
        resumed("zero2_resumed", "zero2", stage=2),
        part("accelerate", trainer="accelerate", save_after=10, num_workers=2),
        part("accelerate_resumed", trainer="accelerate", after="accelerate", resume=str(folder / "accelerate")),
        part("accelerate_from_one", trainer="accelerate", resume=str(one / "accelerate")),
    ]
    if importlib.util.find_spec("trl"):
        parts += [
            part("wrapped", trainer="trl", strategy="wrapped", **ddp),
            part("wrapped_from_one", trainer="trl", strategy="wrapped", resume=str(one / "wrapped" / "checkpoint-10")),
            part("bfd", trainer="trl", strategy="bfd", **ddp),
            resumed("bfd_resumed", "bfd", trainer="trl", strategy="bfd"),
        ]
    return launch_parts(folder, __file__, parts, RANKS)


@pytest.mark.parametrize("part", ["ddp", "zero1", "zero2"])
def test_two_ranks_train_the_rows_of_the_run_at_its_rates(launched, one_rank, plan, part):
    from helpers.hf import expected_rows

    two, steps = launched[part], range(1, plan.steps + 1)
    assert by_step(two["batches"]) == expected_rows(plan)
    assert two["rates"] == [plan.learning_rate(step) for step in steps]
    assert two["tokens"] == [8 * plan.seqlen(step) for step in steps]
    assert two["evaluated"] == [32]
    assert two["losses"] == pytest.approx(one_rank[1]["hf"]["losses"], abs=2e-3)


@pytest.mark.parametrize("part", ["from_one", "zero2_resumed"])
def test_two_ranks_resume_to_the_rows_of_the_run(launched, one_rank, plan, part):
    from helpers.hf import expected_rows

    assert plan.seqlen(10) < plan.full_length
    assert by_step(launched[part]["batches"]) == expected_rows(plan, first=11)
    assert launched[part]["rates"] == [plan.learning_rate(step) for step in range(11, plan.steps + 1)]
    assert launched[part]["losses"][-5:] == pytest.approx(one_rank[1]["hf"]["losses"][-5:], abs=2e-3)


def test_a_loop_of_accelerate_trains_the_rows_of_the_run(one_rank, plan):
    from helpers.hf import expected_rows

    one, steps = one_rank[1]["accelerate"], range(1, plan.steps + 1)
    assert by_step([one["batches"]]) == expected_rows(plan)
    assert one["lengths"] == [plan.seqlen(step) for step in steps]
    assert one["rates"] == [plan.learning_rate(step) for step in steps]
    assert one["tokens"] == plan.consumed_tokens(plan.steps)
    assert one["losses"] == pytest.approx(one_rank[1]["hf"]["losses"], abs=2e-3)


def test_a_loop_of_accelerate_resumes_bit_identically(one_rank, run, tmp_path):
    folder, results = one_rank
    resumed = train_accelerate(tmp_path, run, accumulation=4, resume=folder / "accelerate", num_workers=2)
    whole = results["accelerate"]
    assert resumed["batches"] == whole["batches"][40:]
    assert resumed["losses"] == whole["losses"][10:]
    assert resumed["weights"] == whole["weights"]


def test_two_ranks_of_accelerate_train_and_resume_the_rows_of_the_run(launched, one_rank, plan):
    from helpers.hf import expected_rows

    two, one, steps = launched["accelerate"], one_rank[1]["accelerate"], range(1, plan.steps + 1)
    assert by_step(two["batches"]) == expected_rows(plan)
    assert two["rates"] == [plan.learning_rate(step) for step in steps]
    assert two["tokens"] == plan.consumed_tokens(plan.steps)
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-3)
    for part in ("accelerate_resumed", "accelerate_from_one"):
        assert by_step(launched[part]["batches"]) == expected_rows(plan, first=11)
        assert launched[part]["losses"] == pytest.approx(one["losses"][10:], abs=2e-3)


@needs_trl
@pytest.mark.parametrize("part", ["wrapped", "bfd"])
def test_two_ranks_of_trl_train_the_rows_of_one(launched, one_rank, run, plan, part):
    from helpers.sft import sft_run

    from seqlen_curriculum.integrations.plan import TrainerPlan

    two, one = launched[part], one_rank[1][part]
    if part == "bfd":
        plan = TrainerPlan.of(sft_run(run, part), global_batch=8, max_lr=5e-3, padding_free=True)
    assert two["rates"] == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]
    assert two["tokens"] == one["tokens"]
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-3)
    if part == "wrapped":
        assert by_step(two["batches"]) == by_step([one["batches"]])
        assert two["evaluated"] == 32
    else:  # a micro-batch is one row of two packed rows, four of them per step
        assert by_step(two["batches"], global_batch=4) == by_step([one["batches"]], global_batch=4)


@needs_trl
@pytest.mark.parametrize(("part", "global_batch"), [("wrapped_from_one", 8), ("bfd_resumed", 4)])
def test_two_ranks_of_trl_resume_mid_warmup(launched, one_rank, part, global_batch):
    one, resumed = one_rank[1][part.split("_")[0]], launched[part]
    assert by_step(resumed["batches"], global_batch) == by_step([one["batches"]], global_batch)[10:]
    assert resumed["losses"][-5:] == pytest.approx(one["losses"][-5:], abs=2e-3)


if __name__ == "__main__":
    do_parts(train_part)
