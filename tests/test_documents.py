"""A run whose attention stops at document ends: its parts are those of a reference made of plain lists, on any ranks."""

import json
import pickle
from random import Random

import numpy as np
import pytest
import torch
from helpers.command import slw
from helpers.documents import END, write_documents
from helpers.settings import changed

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.blend import Blend
from seqlen_curriculum.data.document_use import document_use
from seqlen_curriculum.data.from_config import open_run_data, open_training_data
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.permutation import permute
from seqlen_curriculum.data.samples import split_bounds
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.models.document_attention import DocumentParts, mean_loss
from seqlen_curriculum.training.documents import DocumentBatches
from seqlen_curriculum.training.eval_chunks import eval_chunks


class Source:
    """The rows of one source, one after the other: lists of (corpus, position) of each input."""

    def __init__(self, ranges, seq_length, seed, recycle):
        self.ranges, self.seq_length, self.seed, self.recycle = ranges, seq_length, seed, recycle
        self.fresh, self.rest = [], []
        for corpus, first, end in ranges:
            inputs = [(corpus, position) for position in range(first, end - 1)]
            whole = len(inputs) // seq_length * seq_length
            self.fresh += [inputs[at : at + seq_length] for at in range(0, whole, seq_length)]
            self.rest += inputs[whole:]
        self.epoch = -1
        self.queue, self.left = [], []

    def next(self, used):
        """Return the first ``used`` inputs of the next sample."""
        if not self.queue and len(self.left) >= self.seq_length and self.recycle:
            self.queue, self.left = [self.left[: self.seq_length]], self.left[self.seq_length :]
        if not self.queue:
            self.epoch += 1
            order = permute(np.arange(len(self.fresh)), len(self.fresh), self.seed, self.epoch).tolist()
            self.queue, self.left = [self.fresh[number] for number in order], list(self.rest)
        sample = self.queue.pop(0)
        self.left += sample[used:]
        return sample[:used]


def starts_of(row, corpora):
    """Return (where parts begin, where the first token of a document is predicted) of a row's inputs."""
    starts, firsts = [], []
    for place, (corpus, position) in enumerate(row):
        joined = place > 0 and row[place - 1] == (corpus, position - 1)
        firsts.append(corpora[corpus][position] == END)
        starts.append(not joined or firsts[-1])
    return starts, firsts


def positions_of(starts, window, restart):
    """Return (positions, where attention is cut) of a row."""
    cuts = [start or (window is not None and place % window == 0) for place, start in enumerate(starts)]
    positions, begin = [], 0
    for place, (start, cut) in enumerate(zip(starts, cuts, strict=True)):
        if start or (cut and restart):
            begin = place
        positions.append(place - begin)
    return positions, cuts


def random_case(random, folder):
    """Return the configuration of a run, and its corpora as lists of tokens with the start of each document."""
    longest = random.randint(1, 24)
    corpora, token = [], 1
    for number in range(random.choice([1, 1, 2, 3])):
        lengths = [random.choice([0, 1, 2, 3, random.randint(1, 3 * longest)]) for _ in range(random.randint(2, 30))]
        lengths[0] = 2 * longest + 1  # a sample in each corpus
        corpora.append(write_documents(folder / f"c{number}", lengths, token))
        token += sum(lengths)
    prefixes = [str(folder / f"c{number}") for number in range(len(corpora))]
    if len(corpora) > 1 and random.random() < 0.7:
        prefixes = [[random.choice([1, 0.25, 3]), prefix] for prefix in prefixes]
    batch = 4 * random.randint(1, 2)
    data = {
        "train": prefixes,
        "seq_length": longest,
        "split": random.choice(["1", "80,10,10"]),
        "attention": "document",
    }
    data["leftovers"] = random.choice(["drop", "recycle"])
    raw = {"train_batch_size": batch, "data": data, "training": {"seed": random.randint(0, 2**40), "eval_interval": 0}}
    tokens = sum(len(documents) for documents, _ in corpora)
    raw["training"]["train_tokens"] = random.randint(batch, batch + 3 * tokens)
    if random.random() < 0.9:
        raw["curriculum_learning"] = curriculum(random, longest)
    return raw, corpora


def curriculum(random, longest):
    shortest, steps = random.randint(1, longest), random.randint(1, 9)
    method = random.choice(["truncate", "segment", "window"])
    block = {"enabled": True, "min_difficulty": shortest, "max_difficulty": longest, "method": method}
    block["restart_positions"] = method == "window" and random.random() < 0.5
    if random.random() < 0.3:
        block |= {"batch_growth": True, "min_tokens_per_step": random.randint(1, 4 * shortest)}
    lengths = [random.randint(shortest, longest) for _ in range(2)]
    return block | random.choice(
        [
            {
                "schedule_type": "fixed_linear",
                "schedule_config": {"total_curriculum_step": steps, "difficulty_step": 1},
            },
            {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": lengths, "max_step": [steps]}},
            {"schedule_type": "fixed_mixed", "schedule_config": {"difficulty": lengths, "steps": [steps, 2]}},
        ]
    )


def reference_sources(raw, corpora):
    """Return (the sources, a function of the number of a sample that returns its source)."""
    data, seed = raw["data"], raw["training"]["seed"]
    ranges = []
    for number, (tokens, starts) in enumerate(corpora):
        first, end = split_bounds(len(starts), data["split"])[:2]
        bounds = [*starts, len(tokens)]
        ranges.append((number, bounds[first], bounds[end]))
    weights = [entry[0] for entry in data["train"]] if isinstance(data["train"][0], list) else None
    parts = [[part] for part in ranges] if weights else [ranges]
    sources = [Source(part, data["seq_length"], seed, data["leftovers"] == "recycle") for part in parts]
    blend = Blend(weights or [1])
    return sources, lambda sample: int(blend.locate(np.array([sample]))[0][0])


def assert_equals_reference(random, folder):
    raw, corpora = random_case(random, folder)
    config = RunConfig.from_dict(raw)
    data, again = open_training_data(config), pickle.loads(pickle.dumps(open_training_data(config)))
    timeline, shortening = data.timeline, config.shortening
    sources, source_of = reference_sources(raw, corpora)
    tokens = [corpus for corpus, _ in corpora]
    world, resumed_at, sample = random.choice([1, 2, 4]), random.randint(1, timeline.steps), 0
    for step in range(1, timeline.steps + 1):
        seqlen, samples = timeline.seqlen(step), timeline.samples(step)
        row_tokens, rows = shortening.tokens_per_row(seqlen), []
        for _ in range(samples):
            inputs = sources[source_of(sample)].next(shortening.used_tokens_per_sample(seqlen))
            rows += [inputs[at : at + row_tokens] for at in range(0, len(inputs), row_tokens)]
            sample += 1
        reader = data if step < resumed_at else again.along(timeline)
        share = samples // world
        read = np.concatenate([reader.read(step, rank * share, share)[0] for rank in range(world)])
        assert read.tolist() == [[tokens[corpus][position] for corpus, position in row] for row in rows]
        documents = reader.document_rows(step)
        starts, firsts = zip(*(starts_of(row, tokens) for row in rows), strict=True)
        assert documents.starts().tolist() == list(starts)
        assert documents.first_targets.tolist() == list(firsts)
        assert documents.num_first_targets == sum(map(sum, firsts))
        window = seqlen if shortening.method == "window" else None
        restart = config.plan.scheduler.config.restart_positions
        of_rank = len(rows) // world
        for rank in range(world):
            own = slice(rank * of_rank, (rank + 1) * of_rank)
            parts = DocumentParts.of(documents[own].starts(), window, restart)
            positions, cuts = zip(*(positions_of(row, window, restart) for row in starts[own]), strict=True)
            assert parts.positions.tolist() == list(positions)
            assert parts.bounds.tolist() == [*np.flatnonzero(cuts).tolist(), of_rank * row_tokens]


@pytest.mark.parametrize("number", range(30))
def test_the_parts_of_a_run_are_those_of_lists(number, tmp_path):
    assert_equals_reference(Random(f"documents {number}"), tmp_path)


@pytest.mark.slow
def test_the_parts_of_many_runs_are_those_of_lists(tmp_path):
    for number in range(2000):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_equals_reference(Random(f"documents {number}"), folder)


def test_documents_are_found_by_position(tmp_path):
    write_documents(tmp_path / "c", [0, 3, 0, 1, 4, 0])  # starts 0 0 3 3 4 8
    corpus = IndexedCorpus(tmp_path / "c")
    found = corpus.first_documents_from(np.arange(10))
    assert found.tolist() == [0, 2, 2, 2, 4, 5, 5, 5, 5, 6]


RUN = {
    "train_batch_size": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "model": {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "vocab_size": 999,
    },
    "data": {"train": ["c"], "seq_length": 8, "split": "1", "attention": "document"},
    "training": {"train_tokens": 64, "eval_interval": 0},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pipeline": {"stages": 1}, "training__compile": True},
            "training.compile: true doesn't work with data.attention",
        ),
        ({"sequence_parallel_size": 2}, 'sequence_parallel_size: 2 doesn\'t work with data.attention: "document"'),
        ({"data__order": "decomposed"}, 'data.attention: "document" has no effect with data.order "decomposed"'),
        ({"data__attention": "documents"}, "data.attention: 'documents' is not valid"),
        ({"data__attention": "row", "data__eod_mask_loss": True}, 'eod_mask_loss: true needs attention "document"'),
    ],
)
def test_what_is_refused_by_the_file_alone(changes, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(changed(RUN, **changes))
    assert len(caught.value.problems) == 1
    assert message in str(caught.value).replace('"documents"', "'documents'")


def test_documents_are_no_method_of_a_curriculum():
    block = {"enabled": True, "min_difficulty": 2, "max_difficulty": 8, "method": "documents"}
    block |= {"schedule_type": "fixed_linear", "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 2}}
    with pytest.raises(
        ConfigError, match=r'curriculum_learning.method: "documents" .* set data.attention to "document"'
    ):
        RunConfig.from_dict({**RUN, "curriculum_learning": block})


def test_a_run_of_whole_rows_has_the_settings_of_older_checkpoints():
    assert RunConfig.from_dict(RUN).settings()["data.attention"] == "document"
    assert "data.attention" not in RunConfig.from_dict(changed(RUN, data__attention="row")).settings()


@pytest.mark.parametrize("ends", [(1, 2), (1,)])
def test_documents_without_a_common_end_are_refused(tmp_path, ends):
    with CorpusWriter(tmp_path / "c", 99) as writer:
        for end in ends:
            writer.add_document(np.array([5] * 20 + [end]))
    config = RunConfig.from_dict(changed(RUN, data__train=[str(tmp_path / "c")]))
    with pytest.raises(DataError, match=r'data.attention "document" needs documents that end with one token'):
        open_run_data(config)
    with pytest.raises(DataError, match=r'or set data.attention to "row"'):
        document_use(config)
    as_file = config.as_file()
    open_run_data(RunConfig.from_dict(changed(as_file, data__attention="row")))


def test_plan_and_inspect_count_the_targets_that_begin_a_document(tmp_path):
    write_documents(tmp_path / "c", [20, 0, 5, 30, 1, 25])  # 81 tokens, 80 targets, of which 4 are first tokens
    path = tmp_path / "run.json"
    path.write_text(json.dumps(changed(RUN, data__train=[str(tmp_path / "c")], training__train_tokens=80)))
    (planned,) = json.loads(slw("plan", path, "--json").stdout)["documents"]
    expected = {"documents": 5, "tokens": 80, "first_targets": 4, "parts_per_row": 1 + 7 * 4 / 80}
    assert planned == {"name": str(tmp_path / "c"), **expected}
    assert json.loads(slw("inspect", path, "--json").stdout)["documents"] == [planned]
    said = "of the 80 targets per epoch 4 are the first token of a document"
    assert said in slw("plan", path).stdout
    assert said in slw("inspect", path).stdout
    steps = [json.loads(slw("inspect", path, "--step", step, "--json").stdout) for step in (1, 2, 3)]
    counted = [step["document_starts"] for step in steps]  # ten samples, of 4, 4 and 4 (the next epoch begins)
    data = open_training_data(RunConfig.load(path))
    assert counted == [data.document_rows(step).num_first_targets for step in (1, 2, 3)]
    assert 4 <= sum(counted) <= 8
    assert f"; {counted[0]} targets are the first token of a document" in slw("inspect", path, "--step", 1).stdout
    whole_rows = json.loads(slw("inspect", path, "--step", 1, "--set", "data.attention=row", "--json").stdout)
    assert "document_starts" not in whole_rows


def test_other_loops_are_refused():
    with pytest.raises(ConfigError, match=r"data.attention: not available in another trainer"):
        TrainerPlan.of(RUN, global_batch=4)


@pytest.fixture
def masked(tmp_path):
    """The configuration of a run that doesn't train on first tokens, on a corpus of short documents."""
    random = Random(1)
    write_documents(tmp_path / "c", [random.randint(1, 6) for _ in range(60)])
    changes = {"data__train": [str(tmp_path / "c")], "data__eod_mask_loss": True, "training__train_tokens": 96}
    return RunConfig.from_dict(changed(RUN, **changes, train_batch_size=6))


def losses_of(tokens, parts, row_tokens):
    """Return the weighted mean of known losses, the tokens themselves, as ``mean_loss`` computes it."""
    outputs = torch.from_numpy(tokens.astype(np.float64)).reshape(-1, row_tokens)
    return float(mean_loss(lambda found, _: found.mean(), outputs, outputs, parts))


@pytest.mark.parametrize(("ranks", "micro_rows"), [(1, 6), (1, 2), (2, 3), (3, 1), (6, 1)])
def test_masked_first_targets_weigh_nothing_on_any_ranks(masked, ranks, micro_rows):
    data, batches = open_training_data(masked), DocumentBatches.of(masked)
    for step in (1, 2):
        inputs, documents = data.read(step)[0], data.document_rows(step)
        expected = float(inputs[inputs != END].mean())
        assert 0 < documents.num_first_targets == np.count_nonzero(inputs == END)
        found = []
        for rank in range(ranks):
            own = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
            parts = batches.of_step(documents, own, micro_rows, masked.plan, step, torch.device("cpu"))
            rows = np.split(inputs[own], len(parts))
            found.append(np.mean([losses_of(tokens, one, 8) for tokens, one in zip(rows, parts, strict=True)]))
        assert np.mean(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_evaluation_is_the_mean_over_unmasked_targets_on_any_ranks(masked, ranks):
    samples, batches = open_training_data(masked).sources[0], DocumentBatches.of(masked)
    ids = np.arange(7)
    inputs = samples.read(ids, 8)[:, :-1]
    total = 0.0
    for rank in range(ranks):
        for chunk, weight in eval_chunks(ids, rank, ranks, 2):
            parts = batches.of_samples(samples, ids, chunk, torch.device("cpu"))
            total += losses_of(samples.read(chunk, 8)[:, :-1], parts, 8) * weight / ranks
    assert total / len(ids) == pytest.approx(float(inputs[inputs != END].mean()), rel=1e-12)


def test_a_micro_batch_without_unmasked_targets_has_no_loss():
    parts = DocumentParts.of(np.ones((1, 3), dtype=bool)).keeping(np.zeros((1, 3), dtype=bool), 1.5)
    assert losses_of(np.array([[5, 6, 7]]), parts, 3) == 0
