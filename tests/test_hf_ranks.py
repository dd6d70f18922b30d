"""Hugging Face's Trainer on two ranks: DDP, DeepSpeed's ZeRO 1 and 2, and a resume from one rank on two.

This module is also the launched script.
"""

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


def train(folder, run, resume=None, stage=None, **changes):
    """Train on this rank; return what all ranks saw together."""
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from helpers.hf import arguments, losses, rates, tiny_llama
    from torch import distributed as dist

    from seqlen_curriculum.integrations.plan import TrainerPlan
    from seqlen_curriculum.integrations.torch_data import RunRows
    from seqlen_curriculum.integrations.transformers import SequenceLengthWarmupTrainer

    AcceleratorState._reset_state(reset_partial_state=True)  # each part has an engine of its own
    assert PartialState._shared_state == {}
    deepspeed = {} if stage is None else {"deepspeed": {**ZERO, "zero_optimization": {"stage": stage}}}
    args = arguments(folder, gradient_accumulation_steps=2, **deepspeed, **changes)
    model = tiny_llama()
    rows = RunRows(TrainerPlan.of(run, global_batch=8, max_lr=5e-3))
    trainer = SequenceLengthWarmupTrainer(model=model, args=args, train_dataset=rows, curriculum=run)
    trainer.train(resume_from_checkpoint=resume)
    own = [[ids.tolist() for trains, ids in model.seen if trains]]
    gathered = [None] * RANKS
    dist.all_gather_object(gathered, own[0])
    weights = [weight.detach().double().flatten() for weight in model.parameters()]
    return {
        "batches": gathered,
        "losses": losses(trainer),
        "rates": rates(trainer),
        "steps": trainer.state.global_step,
        "weights": float(torch.cat(weights).norm()),
    }


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
def one_rank(run, tmp_path_factory):
    """The same run on one rank in this process, which leaves checkpoint-10."""
    from helpers.hf import arguments, tiny_llama

    from seqlen_curriculum.integrations.plan import TrainerPlan
    from seqlen_curriculum.integrations.torch_data import RunRows
    from seqlen_curriculum.integrations.transformers import SequenceLengthWarmupTrainer

    folder = tmp_path_factory.mktemp("one")
    rows = RunRows(TrainerPlan.of(run, global_batch=8, max_lr=5e-3))
    args = arguments(folder, save_strategy="steps", save_steps=10)
    trainer = SequenceLengthWarmupTrainer(model=tiny_llama(), args=args, train_dataset=rows, curriculum=run)
    trainer.train()
    return folder, trainer


@pytest.fixture(scope="module")
def launched(run, one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    saved = {"save_strategy": "steps", "save_steps": 10}
    parts = [
        Part("ddp", {"run": run, "folder": str(folder / "ddp"), "dataloader_num_workers": 2}),
        Part("from_one", {"run": run, "folder": str(folder / "ddp"), "resume": str(one_rank[0] / "checkpoint-10")}),
        Part("zero1", {"run": run, "folder": str(folder / "zero1"), "stage": 1, **saved}),
        Part(
            "zero1_resumed",
            {
                "run": run,
                "folder": str(folder / "zero1"),
                "stage": 1,
                "resume": str(folder / "zero1" / "checkpoint-10"),
            },
            after="zero1",
        ),
        Part("zero2", {"run": run, "folder": str(folder / "zero2"), "stage": 2}),
    ]
    return launch_parts(folder, __file__, parts, RANKS)


@pytest.mark.parametrize("part", ["ddp", "zero1", "zero2"])
def test_two_ranks_train_the_rows_of_the_run_at_its_rates(launched, one_rank, part):
    from helpers.hf import expected_rows, losses

    _, trainer = one_rank
    plan, two = trainer.plan, launched[part]
    assert two["steps"] == plan.steps
    assert by_step(two["batches"]) == expected_rows(plan)
    assert two["losses"] == pytest.approx(losses(trainer), abs=2e-3)
    if part == "ddp":  # under DeepSpeed Hugging Face logs the rate after the step
        assert two["rates"] == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


@pytest.mark.parametrize("part", ["from_one", "zero1_resumed"])
def test_two_ranks_resume_to_the_rows_of_the_run(launched, one_rank, part):
    from helpers.hf import expected_rows, losses

    plan = one_rank[1].plan
    assert by_step(launched[part]["batches"]) == expected_rows(plan, first=11)
    assert launched[part]["losses"][-5:] == pytest.approx(losses(one_rank[1])[-5:], abs=2e-3)


if __name__ == "__main__":
    do_parts(train)
