"""A run on pieces of documents reads what a reference made of plain lists reads: token by token, on any number of ranks."""

import math
import pickle
from collections import Counter
from fractions import Fraction
from functools import cache
from random import Random

import numpy as np
import pytest

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.from_config import open_training_data, with_buckets
from seqlen_curriculum.data.permutation import permute
from seqlen_curriculum.data.samples import split_bounds
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.planning.summary import plan

END = 0
"""The token that ends each document. Every other token of a corpus is different, so that a token shows where it is from."""


def write_corpus(prefix, lengths, first_token=1):
    """Write documents of ``lengths`` tokens, the last of which is END; return them as lists."""
    documents, token = [], first_token
    for length in lengths:
        documents.append([*range(token, token + length - 1), END][:length] if length else [])
        token += max(length - 1, 0)
    with CorpusWriter(prefix, 2**20) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    return documents


def pieces_of(documents, first, end, longest):
    """Return {length: [(inputs, targets), ...]} of the documents ``first`` to ``end``, cut one after the other."""
    stream, starts = [], []
    for document in documents:
        starts.append(len(stream))
        stream += document
    pieces = {1 << power: [] for power in range(longest.bit_length())}
    for number in range(first, end):
        start, stop = starts[number], starts[number] + len(documents[number])
        start = max(start, 1)  # the first token of the corpus has no input
        while start < stop:
            length = longest
            while length > stop - start:
                length //= 2
            pieces[length].append((stream[start - 1 : start + length - 1], stream[start : start + length]))
            start += length
    return pieces


class Reference:
    """The run of a case: a list of rows per step, made one after the other."""

    def __init__(self, raw, corpora):
        data, training = raw["data"], raw["training"]
        self.raw, self.seed = raw, training["seed"]
        self.longest = data["seq_length"]
        self.lengths = [
            1 << power for power in range(self.longest.bit_length()) if 1 << power >= data["min_piece_tokens"]
        ]
        self.step_tokens = raw["train_batch_size"] * self.longest
        self.steps = math.ceil(training["train_tokens"] / self.step_tokens)
        weighted = isinstance(data["train"][0], list)
        self.weights = [weight for weight, _ in data["train"]] if weighted else [1]
        parts = []
        for documents in corpora:
            first, end = split_bounds(len(documents), data["split"])[:2]
            parts.append(pieces_of(documents, first, end, self.longest))
        if not weighted:  # one source: the pieces of all corpora, one corpus after the other
            parts = [{length: [piece for part in parts for piece in part[length]] for length in parts[0]}]
        self.sources = parts
        self.tokens = [sum(length * len(source[length]) for length in self.lengths) for source in parts]
        self.dropped = [
            sum(length * len(pieces) for length, pieces in source.items() if length not in self.lengths)
            for source in parts
        ]

        self.row_shares = {length: self.shares_of_rows(length) for length in self.lengths}

    def shares_of_rows(self, length):
        """Return [(source, the share that it takes of the rows that the sources before it leave)]."""
        weights = [self.weight(source, length) for source in range(len(self.sources))]
        return [
            (source, Fraction(max(round(2**31 * weight / sum(weights[source:])), 1), 2**31))
            for source, weight in enumerate(weights)
            if weight
        ]

    def weight(self, source, length):
        return Fraction(str(float(self.weights[source]))) * Fraction(
            len(self.sources[source][length]), self.tokens[source]
        )

    def step_lengths(self):
        data = self.raw["data"]
        block = self.raw.get("curriculum_learning")
        if block is not None:
            config = RunConfig.from_dict(
                {
                    **self.raw,
                    "data": {**data, "order": "packed"}
                    | dict.fromkeys(("min_piece_tokens", "bucket_curriculum", "bucket_cycles", "bucket_odds")),
                }
            )
            exact = config.curriculum.pacing()
            return [
                max(length for length in self.lengths if length <= exact(step)) for step in range(1, self.steps + 1)
            ]
        shares = [length * sum(self.weight(n, length) for n in range(len(self.sources))) for length in self.lengths]
        shares = [float(share / sum(shares)) for share in shares]
        counts = [self.steps + 2 if share else 0 for share in shares]
        drawn = in_turn(counts, shares)[: self.steps]
        if data.get("bucket_curriculum") == "grow":
            odds = data.get("bucket_odds") or [2 ** (len(self.lengths) - 1 - k) for k in range(len(self.lengths))]
            cycles, parts = min(data.get("bucket_cycles") or 8, self.steps), []
            for cycle in range(cycles):
                part = drawn[cycle * self.steps // cycles : (cycle + 1) * self.steps // cycles]
                parts += in_turn([part.count(k) for k in range(len(self.lengths))], odds)
            drawn = parts
        return [self.lengths[k] for k in drawn]

    def read(self):
        """Yield (length, [(source, epoch, inputs, targets), ...]) of each step."""
        row_of_bucket, row_of_source = Counter(), Counter()
        for length in self.step_lengths():
            rows = []
            for _ in range(self.step_tokens // length):
                source = self.source_of(length, row_of_bucket[length])
                row_of_bucket[length] += 1
                pieces = self.sources[source][length]
                epoch, number = divmod(row_of_source[source, length], len(pieces))
                row_of_source[source, length] += 1
                rows.append((source, epoch, *pieces[order_of_epoch(len(pieces), self.seed, epoch)[number]]))
            yield length, rows

    def source_of(self, length, row):
        for source, share in self.row_shares[length]:
            before = math.ceil(row * share)
            if math.ceil((row + 1) * share) > before:
                return source
            row -= before
        raise AssertionError("no source takes the row")


@cache
def order_of_epoch(size, seed, epoch):
    return permute(np.arange(size), size, seed, epoch).tolist()


def in_turn(counts, rates):
    """Return bucket k ``counts[k]`` times, its draw j at the time (j + 1/2) / rates[k]."""
    times = [((j + 0.5) / rates[k], k) for k, count in enumerate(counts) for j in range(count)]
    return [k for _, k in sorted(times)]


def random_case(random, folder):
    """Return the configuration of a run and its corpora, as lists of documents."""
    longest = 2 ** random.randint(1, 5)
    shortest = 2 ** random.randint(0, longest.bit_length() - 1)
    corpora, token = [], 1
    for number in range(random.choice([1, 1, 2, 3])):
        count = random.choice([2, 5, 20, 64, 65, 150])
        lengths = [random.choice([0, 1, 2, 3, random.randint(1, 3 * longest), longest]) for _ in range(count)]
        lengths[-1] = 3 * longest + 1  # each corpus has pieces of every training split, and an end
        lengths[0] = 2 * longest
        corpora.append(write_corpus(folder / f"c{number}", lengths, token))
        token += sum(lengths)
    prefixes = [str(folder / f"c{number}") for number in range(len(corpora))]
    if len(corpora) > 1 and random.random() < 0.7:
        prefixes = [[random.choice([1, 0.3, 2.5]), prefix] for prefix in prefixes]
    batch = 4 * random.randint(1, 2)
    data = {"train": prefixes, "seq_length": longest, "split": random.choice(["1", "80,10,10"]), "order": "decomposed"}
    data["min_piece_tokens"] = shortest
    raw = {"train_batch_size": batch, "data": data, "training": {"seed": random.randint(0, 2**40), "eval_interval": 0}}
    kind = random.choice(["uniform", "grow", "grow", "schedule"])
    if kind == "grow":
        data["bucket_curriculum"] = kind
        data["bucket_cycles"] = random.choice([None, 1, 3])
        count = (longest // shortest).bit_length()
        data["bucket_odds"] = random.choice([None, [random.choice([0.5, 1, 3, 100]) for _ in range(count)]])
    tokens = sum(len(document) for documents in corpora for document in documents)
    steps = random.randint(1, 2 + int(random.choice([0.5, 4]) * tokens / batch / longest))
    raw["training"]["train_tokens"] = random.randint(
        max((steps - 1) * batch * longest + 1, batch), steps * batch * longest
    )
    if kind == "schedule":
        raw["curriculum_learning"] = schedule(random, shortest, longest)
    return raw, corpora


def schedule(random, shortest, longest):
    steps = random.randint(1, 12)
    block = {"enabled": True, "min_difficulty": shortest, "max_difficulty": longest}
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


def has_pieces_of_all_lengths(reference):
    lengths = set(reference.step_lengths())
    return all(any(source[length] for source in reference.sources) for length in lengths) and all(reference.tokens)


def assert_equals_reference(random, folder):
    raw, corpora = random_case(random, folder)
    reference = Reference(raw, corpora)
    if not has_pieces_of_all_lengths(reference):
        return
    config = with_buckets(RunConfig.from_dict(raw))
    data = open_training_data(config)
    again = pickle.loads(pickle.dumps(data))  # as after a resume, in another process
    timeline, trained = data.timeline, Counter()
    world, expected = random.choice([1, 2, 4]), list(reference.read())
    assert timeline.steps == len(expected) == reference.steps
    resumed_at = random.randint(1, timeline.steps)
    for step, (length, rows) in enumerate(expected, 1):
        reader = data if step < resumed_at else again.along(timeline)
        assert (timeline.seqlen(step), timeline.rows(step)) == (length, len(rows))
        share = len(rows) // world
        parts = [reader.read(step, rank * share, share) for rank in range(world)]
        inputs, targets = (np.concatenate(part).tolist() for part in zip(*parts, strict=True))
        assert inputs == [row[2] for row in rows]
        assert targets == [row[3] for row in rows]
        ids = reader.sample_ids(step)
        assert list(zip(ids.source.tolist(), ids.epoch.tolist(), strict=True)) == [row[:2] for row in rows]
        assert timeline.consumed_tokens(step) == step * reference.step_tokens
        for source, epoch, _, tokens in rows:
            trained[source, length, epoch] += 1
            assert END not in tokens[:-1]  # of one document
            assert len(tokens) == length
    assert_spans_are_read(data, random.randint(1, timeline.steps))
    assert_plan_equals_run(plan(config), reference, trained)


def assert_spans_are_read(data, step):
    inputs, _ = data.read(step)
    for source, spans in data.token_spans(step):
        for row, column, length, number, start in zip(*(part.tolist() for part in spans), strict=True):
            corpus, first, end = data.sources[source].ranges[number]
            assert (column, length) == (0, inputs.shape[1])
            assert first <= start + 1 < start + 1 + length <= end
            assert np.array_equal(corpus.tokens[start : start + length], inputs[row])


def assert_plan_equals_run(planned, reference, trained):
    for number, source in enumerate(planned["pieces"]):
        assert source["tokens"] == reference.tokens[number]
        assert source["dropped_tokens"] == reference.dropped[number]
        for bucket in source["buckets"]:
            length, pieces = bucket["length"], reference.sources[number][bucket["length"]]
            assert bucket["pieces"] == len(pieces)
            epochs = {epoch: rows for (of, at, epoch), rows in trained.items() if (of, at) == (number, length)}
            assert bucket["rows"] == sum(epochs.values())
            # Every epoch but the last reads each piece once: the reference's pieces are different ones.
            assert all(rows == len(pieces) for epoch, rows in epochs.items() if epoch < max(epochs))
    steps = {bucket["length"]: bucket["steps"] for bucket in planned["pieces"][0]["buckets"]}
    assert {length: count for length, count in steps.items() if count} == Counter(reference.step_lengths())


@pytest.mark.parametrize("number", range(60))
def test_a_run_reads_what_lists_give(number, tmp_path):
    assert_equals_reference(Random(f"decomposed {number}"), tmp_path)


@pytest.mark.slow
def test_many_runs_read_what_lists_give(tmp_path):
    for number in range(2000):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_equals_reference(Random(f"decomposed {number}"), folder)
