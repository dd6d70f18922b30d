"""The training loop with a recorded engine: what it reads from the device, seeds and reads ahead. No launch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.launching import wait_until
from helpers.settings import changed

from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.rollbacks import Rollback
from seqlen_curriculum.run_folder.run_log import read_run_log
from seqlen_curriculum.training import benchmark, outcome, preflight
from seqlen_curriculum.training.eval_chunks import eval_chunks
from seqlen_curriculum.training.executor import DataParallel, Pipeline, StepResult
from seqlen_curriculum.training.outcome import share_outcome
from seqlen_curriculum.training.seeding import row_seed, seed_generators
from seqlen_curriculum.training.spike_guard import LossesSoFar, SpikeGuard
from seqlen_curriculum.training.telemetry import Telemetry
from seqlen_curriculum.training.trainer import StopSignals, Trainer
from seqlen_curriculum.training.utilization import Utilization
from seqlen_curriculum.training.watchdog import Watchdog

CPU = torch.device("cpu")


class RecordedEngine(torch.nn.Module):
    """Does what DeepSpeed's engine does for a loss of one weight, and notes the shapes and the random draws."""

    dp_world_size, device, lr_scheduler = 1, CPU, None
    monitor = SimpleNamespace(enabled=False)

    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(1, 1)
        self.global_steps = self.global_samples = 0
        self.seen, self.draws = [], []

    def forward(self, inputs, targets):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        self.seen.append(tuple(inputs.shape))
        self.draws.append(float(torch.nn.functional.dropout(torch.ones(64)).double().dot(torch.arange(64.0).double())))
        return self.module.weight.square().sum() * inputs.double().mean() + 3

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.global_steps += self.boundary

    def set_gradient_accumulation_boundary(self, boundary):
        self.boundary = boundary

    def set_train_micro_batch_size(self, rows):
        self.rows = rows

    set_train_batch_size = set_train_micro_batch_size

    def get_lr(self):
        return [0.1]

    def fp16_enabled(self):
        return False

    bfloat16_enabled = zero_optimization = gradient_clipping = fp16_enabled


@pytest.fixture
def one_rank(monkeypatch):
    ranks = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1)
    for module in ("executor", "outcome", "progress"):
        monkeypatch.setattr(f"seqlen_curriculum.training.{module}.dist", ranks)


@pytest.fixture
def trainer_of(one_rank, tmp_path):
    """A trainer of a run, and its engine."""
    made = []

    def make(run, rollbacks=(), **more):
        config = RunConfig.from_dict(run).for_ranks(1)
        data, valid = open_run_data(config)
        engine = RecordedEngine()
        timeline, utilization = config.plan.timeline, Utilization(config.model, None)
        telemetry = Telemetry(tmp_path / "runlog.jsonl", engine.monitor, 0, timeline, utilization)
        made.append(
            Trainer(
                executor=DataParallel(engine),
                plan=config.plan,
                train_data=data,
                valid_samples=valid,
                settings=config.training,
                telemetry=telemetry,
                watchdog=Watchdog(0, timeline.consumed_tokens),
                guard=SpikeGuard(config.training, rollbacks, LossesSoFar()),
                signals=StopSignals(),
                save=lambda *_: None,
                wait_for_checkpoint=lambda: None,
                evaluations=Evaluations(),
                **more,
            )
        )
        return made[-1], engine

    yield make
    for one in made:
        one.close()


READS = ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "numpy", "cpu")


@pytest.fixture
def host_reads(monkeypatch):
    """The names of the methods that bring a tensor's values to the host, as they are called."""
    seen = []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            seen.append(name)
            return original(tensor, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return seen


def test_a_step_reads_the_device_once_whatever_its_micro_batches(trainer_of, tiny_run, host_reads, monkeypatch):
    trainer, engine = trainer_of(changed(tiny_run, training__micro_batch="fixed", training__variance_interval=0))
    monkeypatch.setattr(engine, "forward", lambda *_: engine.module.weight.square().sum() + 3)
    host_reads.clear()
    assert not trainer.step(1, False)
    assert host_reads == ["tolist"]
    assert engine.global_steps == 1


def test_steps_have_the_planned_batches_and_the_log_the_wait_for_them(trainer_of, tiny_run, tmp_path):
    trainer, engine = trainer_of(changed(tiny_run, training__variance_interval=0))
    for step in range(1, 5):
        trainer.step(step, False)
    # 8 rows of 8 tokens are as many as 2 of 32; of 12 tokens 5 rows would be, and 4 divide
    assert engine.seen == [(8, 8), (8, 8), (8, 8), (4, 12), (4, 12)]
    records = list(read_run_log(tmp_path / "runlog.jsonl"))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(0 <= record["data_seconds"] <= record["seconds"] for record in records)


def test_dropout_draws_as_after_a_seed_for_all_of_torch(trainer_of, tiny_run):
    trainer, engine = trainer_of(changed(tiny_run, training__micro_batch="fixed", training__variance_interval=0))
    trainer.step(1, False)
    expected = []
    for row in (0, 2, 4, 6):
        torch.manual_seed(row_seed(1234, 1, row))
        expected.append(float(torch.nn.functional.dropout(torch.ones(64)).double().dot(torch.arange(64.0).double())))
    assert engine.draws == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_the_generator_alone_gives_the_same_masks(seed):
    torch.manual_seed(seed)
    mask = torch.nn.functional.dropout(torch.ones(1000), 0.1)
    seed_generators(CPU, seed)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(1000), 0.1), mask)


def test_without_dropout_nothing_is_seeded(trainer_of, tiny_run, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("seeded"))
    trainer, _ = trainer_of(changed(tiny_run, training__variance_interval=0), has_dropout=False)
    before = torch.get_rng_state()
    data = trainer.read(1)
    assert data.seeds == []
    trainer.executor.train(data.micro_batches, data.seeds)
    torch.set_rng_state(before)
    torch.nn.functional.dropout(torch.ones(64))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    trainer.executor.train(data.micro_batches, data.seeds)  # draws once, from where the generator was
    assert torch.equal(torch.get_rng_state(), after)


def reads_of(trainer, monkeypatch):
    """The steps that are read, as they are."""
    seen, read = [], trainer._data._read
    monkeypatch.setattr(trainer._data, "_read", lambda step: (seen.append(step), read(step))[1])
    return seen


def test_nothing_is_read_beyond_the_end_a_stop_or_for_a_skipped_step(trainer_of, tiny_run, monkeypatch):
    rollback = Rollback(step=4, loss=9.0, ratio=3.0, seqlen=8, lr=0.1, returned_to=1, skipped=(3, 4), seconds=0.0)
    run = changed(tiny_run, training__variance_interval=0)
    trainer, _ = trainer_of(run, [rollback], until_step=6)
    seen = reads_of(trainer, monkeypatch)
    for step in range(1, 7):
        trainer.step(step, False)
    assert seen == [1, 2, 5, 6]
    trainer.until_step = 9
    trainer.step(7, True)  # asked to stop
    trainer._data.close()  # waits for the thread
    assert seen == [1, 2, 5, 6, 7]


def test_held_lengths_throw_away_what_was_read_ahead(trainer_of, tiny_run, monkeypatch):
    adaptive = {
        **tiny_run["curriculum_learning"],
        "schedule_type": "adaptive",
        "schedule_config": {"total_curriculum_step": 20, "difficulty_step": 4, "perplexity_ratio": 1.1},
    }
    trainer, engine = trainer_of(changed(tiny_run, curriculum_learning=adaptive, training__variance_interval=0))
    seen = reads_of(trainer, monkeypatch)
    for step in range(1, 8):
        trainer.step(step, False)
    wait_until(lambda: 8 in seen, "step 8 is not read ahead")
    assert trainer._hold_lengths(7, perplexity_ratio=2.0) == 7
    trainer.step(8, False)
    assert engine.seen[-1][1] == trainer.plan.timeline.seqlen(8) == trainer.plan.timeline.seqlen(7)
    assert seen.count(8) == 2


@pytest.mark.parametrize(
    ("norm", "fp16", "expected"),
    [
        (torch.tensor(0.25), False, (0.25, False)),
        (torch.tensor([0.25]), False, (0.25, False)),
        (0.25, False, (0.25, False)),
        (None, False, (None, False)),
        (torch.tensor(float("inf")), True, (None, False)),
        (0.25, True, (0.25, False)),
    ],
)
def test_the_outcome_of_a_step(one_rank, norm, fp16, expected):
    done = share_outcome(StepResult(torch.tensor(3.5, dtype=torch.float64), norm), False, fp16)
    assert (done.loss, done.stop) == (3.5, False)
    assert (done.grad_norm, done.is_broken) == expected


@pytest.mark.parametrize("norm", [float("nan"), torch.tensor(float("inf"))])
def test_a_norm_that_is_not_finite_breaks_the_step(one_rank, norm):
    done = share_outcome(StepResult(torch.tensor(3.5, dtype=torch.float64), norm), True)
    assert (done.is_broken, done.stop) == (True, True)
    assert str(done.grad_norm) == str(float(norm))


def test_ranks_share_the_loss_and_the_flags_in_one_reduction(monkeypatch):
    reduced, norm = [], float(torch.tensor(0.1))

    def all_reduce(values):
        reduced.append(values.tolist())
        values += torch.tensor([5.0, 1.0, norm])  # another rank's loss, its wish to stop, and the same norm

    monkeypatch.setattr(outcome, "dist", SimpleNamespace(get_world_size=lambda: 2, all_reduce=all_reduce))
    done = share_outcome(StepResult(torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.1)))
    assert reduced == [[3.0, 0.0, norm]]
    assert (done.loss, done.stop, done.is_broken) == (4.0, True, False)
    assert done.grad_norm == norm  # fp32's 0.1, to the last bit


@pytest.mark.parametrize(
    ("rows", "ranks", "most"), [(64, 128, 4), (64, 1, 4), (10, 4, 4), (10, 4, 1), (5, 2, 2), (7, 7, 3)]
)
def test_evaluation_counts_each_row_once_in_chunks_of_the_same_shape(rows, ranks, most):
    ids = np.arange(rows) * 3
    chunks = [list(eval_chunks(ids, rank, ranks, most)) for rank in range(ranks)]
    assert len({tuple(len(chunk) for chunk, _ in of_rank) for of_rank in chunks}) == 1
    shared = -(-(rows // ranks) // most)
    assert len(chunks[0]) == shared + (rows % ranks > 0)
    # The loss of a chunk is its rows' mean: weights of 0 and of the chunk's length times the ranks make a sum over rows.
    weights = dict.fromkeys(ids.tolist(), 0.0)
    for chunk, weight in (one for of_rank in chunks for one in of_rank):
        for row in chunk.tolist():
            weights[row] += weight / len(chunk) / ranks
    assert weights == dict.fromkeys(ids.tolist(), 1.0)


def test_64_rows_on_128_ranks_are_one_micro_batch_of_a_row():
    chunks = [list(eval_chunks(np.arange(64), rank, 128, 4)) for rank in range(128)]
    assert [[(chunk.tolist(), weight) for chunk, weight in of_rank] for of_rank in chunks] == [
        [([rank % 64], 128 if rank < 64 else 0)] for rank in range(128)
    ]


def test_preflight_asks_for_all_reports_at_once(monkeypatch):
    asked = []

    class Store(dict):
        def set(self, name, value):
            self[name] = value.encode()

        def wait(self, names, _timeout):
            asked.append(("wait", len(names)))
            for number, name in enumerate(names):
                self.setdefault(name, b"out of memory" if number == 700 else b"")

        def multi_get(self, names):
            asked.append(("multi_get", len(names)))
            return [self[name] for name in names]

    monkeypatch.setattr(preflight, "_get_default_store", Store)
    monkeypatch.setattr(preflight, "dist", SimpleNamespace(get_rank=lambda: 3, get_world_size=lambda: 1024))
    assert preflight._ranks_with("") == [700]
    assert asked == [("wait", 1024), ("multi_get", 1024)]


def test_a_pipeline_evaluates_the_rows_of_its_own_copy_alone():
    seen = []

    class Engine:
        is_data_parallel = True

        def eval_batch(self, batches, num_micro_batches):
            seen.append((list(batches), num_micro_batches, self.is_data_parallel))
            return torch.tensor([2.5])

    pipeline = Pipeline.__new__(Pipeline)
    pipeline.engine = Engine()
    assert pipeline.evaluate(("inputs", "targets")).shape == ()
    assert seen == [([("inputs", "targets")], 1, False)]
    assert pipeline.engine.is_data_parallel  # training averages over all copies


@pytest.mark.parametrize(("is_encoder", "targets"), [(True, (2, 2, 3)), (False, (2, 20))])
def test_the_benchmark_gives_a_model_the_targets_of_its_objective(monkeypatch, is_encoder, targets):
    seen, tokens = [], torch.arange(6 * 21).reshape(6, 21)
    engine = SimpleNamespace(device=CPU)
    executor = SimpleNamespace(engine=engine, data_ranks=1, train=lambda parts, _: seen.extend(parts))
    monkeypatch.setattr(benchmark.dist, "barrier", lambda: None)
    config = SimpleNamespace(model=SimpleNamespace(is_encoder=is_encoder, vocab_size=512), training=None)
    speed, peak = benchmark._one_step(executor, benchmark._objective(config), tokens, 2)
    assert [(tuple(inputs.shape), tuple(wanted.shape)) for inputs, wanted in seen] == [((2, 20), targets)] * 3
    assert speed > 0
    assert peak is None
    if not is_encoder:
        assert torch.equal(torch.cat([wanted for _, wanted in seen]), tokens[:, 1:])
