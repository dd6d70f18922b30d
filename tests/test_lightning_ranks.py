"""Lightning's Trainer on two ranks under DDP, and a resume from one rank on two.

This module is also the launched script.
"""

import pytest
from helpers.parts import Part, do_parts, launch_parts
from helpers.settings import changed

pytest.importorskip("lightning")

RANKS = 2


def train(folder, run, own=False, **options):
    """Train on this rank; return what all ranks saw together."""
    import os

    from helpers.lightning import checkpoints, fit
    from torch import distributed as dist
    from torch.utils.data import DataLoader

    os.environ["WORLD_SIZE"] = str(RANKS)  # Lightning deletes it after each fit
    data = None
    if own:
        rows = [[(token + row) % 257 for token in range(32)] for row in range(80)]
        data = DataLoader(rows, batch_size=2, collate_fn=as_pair)
    module, _ = fit(
        run, folder, checkpoints(folder), data=data, devices=RANKS, strategy="ddp", accumulate_grad_batches=2, **options
    )
    gathered = [None] * RANKS
    dist.all_gather_object(gathered, [module.rows, module.evaluated])
    return {
        "batches": [rows for rows, _ in gathered],
        "evaluated": [rows for _, rows in gathered],
        "losses": module.losses,
        "rates": module.rates,
        "steps": module.trainer.global_step,
        "weights": float(sum(weight.detach().double().norm() for weight in module.parameters())),
    }


def as_pair(rows):
    import torch

    return torch.tensor(rows), torch.tensor(rows)


def of_ranks(batches):
    """Return the batches of all ranks in the order of the run."""
    return [batch for same in zip(*batches, strict=True) for batch in same]


@pytest.fixture(scope="module")
def run(tiny_run):
    return changed(tiny_run, data__leftovers="recycle", training__train_tokens=4000, training__eval_rows=6)


@pytest.fixture(scope="module")
def one_rank(run, tmp_path_factory):
    """The same run on one rank in this process, which leaves step=10.ckpt."""
    from helpers.lightning import checkpoints, fit

    folder = tmp_path_factory.mktemp("one")
    return folder, *fit(run, folder, checkpoints(folder))


@pytest.fixture(scope="module")
def launched(run, one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    shared = {"run": run, "folder": str(folder)}
    own = changed(run, data=None, model=None)
    parts = [
        Part("ddp", {**shared, "options": {"num_workers": 4}}),
        Part("from_one", {**shared, "resume": str(one_rank[0] / "step=10.ckpt")}),
        Part("from_two", {**shared, "resume": str(folder / "step=10.ckpt")}, after="ddp"),
        Part("own", {**shared, "run": own, "own": True, "limit_val_batches": 0}),
    ]
    return launch_parts(folder, __file__, parts, RANKS)


# The hints and deprecations of the run on one rank, as in tests/test_lightning.py
HINTS = [
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
]
pytestmark = [pytest.mark.filterwarnings(hint) for hint in HINTS]


def test_two_ranks_train_the_rows_of_the_run_at_its_rates(launched, one_rank):
    from helpers.hf import expected_rows
    from helpers.lightning import by_step

    _, module, warmup = one_rank
    plan, two = warmup.plan, launched["ddp"]
    assert two["steps"] == plan.steps
    assert by_step(of_ranks(two["batches"]), plan.steps) == expected_rows(plan)
    assert two["rates"] == [plan.learning_rate(step) for step in range(1, plan.steps + 1) for _ in range(2)]
    weights = float(sum(weight.detach().double().norm() for weight in module.parameters()))
    assert two["weights"] == pytest.approx(weights, rel=1e-5)


def test_two_ranks_evaluate_at_full_length(launched, one_rank):
    both = [row for rank in launched["ddp"]["evaluated"] for row in rank]
    assert sorted(both) == sorted(one_rank[1].evaluated)
    assert {len(row) for row in both} == {32}


@pytest.mark.parametrize("part", ["from_one", "from_two"])
def test_two_ranks_resume_to_the_rows_of_the_run(launched, one_rank, part):
    from helpers.hf import expected_rows
    from helpers.lightning import by_step

    plan, resumed = one_rank[2].plan, launched[part]
    assert by_step(of_ranks(resumed["batches"]), plan.steps, first=11) == expected_rows(plan, first=11)
    assert resumed["rates"] == launched["ddp"]["rates"][20:]
    assert resumed["losses"] == pytest.approx(launched["ddp"]["losses"][20:], abs=1e-4)
    assert resumed["weights"] == pytest.approx(launched["ddp"]["weights"], rel=1e-5)


def test_both_ranks_cut_a_users_own_rows_to_the_same_length(launched, one_rank):
    plan = one_rank[2].plan
    for batches in launched["own"]["batches"]:
        assert [len(batch[0]) for batch in batches] == [
            plan.seqlen(step) for step in range(1, plan.steps + 1) for _ in range(2)
        ]
    assert launched["own"]["batches"][0] != launched["own"]["batches"][1]


if __name__ == "__main__":
    do_parts(train)
