"""inspect_data.py: what is in a corpus, what a run reads of it, and what its ranks read, by hand and by brute force."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.command import slw

from seqlen_curriculum import ConfigError, DataError, RunConfig
from seqlen_curriculum.cli import inspect
from seqlen_curriculum.data.from_config import open_training_data
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.inspection import corpus as inspection
from seqlen_curriculum.data.inspection.corpus import corpus_warnings, describe_corpora, inspect_corpora
from seqlen_curriculum.data.inspection.step import describe_step, read_step
from seqlen_curriculum.data.inspection.token_use import account, describe_account, source_use
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.data.writer import CorpusWriter

ROOT = Path(__file__).parent.parent
TEXT = "It was the best of times, it was the wörst of times. " * 40


def write(prefix, *lengths, first=0, vocab_size=5000):
    """A corpus of documents of ``lengths`` tokens, whose token at position p is first + p."""
    ends = np.cumsum(lengths)
    with CorpusWriter(prefix, vocab_size) as writer:
        writer.add_tokens(np.arange(first, first + ends[-1]), ends)
    return str(prefix)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inspected")


@pytest.fixture(scope="module")
def one(folder):
    return write(folder / "one", 100, 0, 401, 60)  # 561 tokens: 560 to train on, 35 samples of 16


@pytest.fixture(scope="module")
def two(folder):
    return write(folder / "two", 250, 56, first=1000)  # 306 tokens: 305 to train on, 19 samples of 16 and 1 over


def run_file(train, method="truncate", leftovers="drop", tokens=4000, **more):
    """Lengths 4, 7, 10, 13, 16 in 20 steps of 8 samples; whole corpora."""
    return {
        "train_batch_size": 8,
        "curriculum_learning": {
            "enabled": True,
            "curriculum_type": "seqlen",
            "min_difficulty": 4,
            "max_difficulty": 16,
            "schedule_type": "fixed_discrete",
            "schedule_config": {"difficulty": [4, 7, 10, 13, 16], "max_step": [5, 10, 15, 20]},
            "method": method,
        },
        "data": {"train": train, "seq_length": 16, "split": "1", "leftovers": leftovers},
        "training": {"train_tokens": tokens},
        **more,
    }


@pytest.fixture(scope="module")
def saved(folder, one, two):
    """The file of a run that blends and recycles."""
    path = folder / "run.json"
    path.write_text(json.dumps(run_file([[3, one], [1, two]], leftovers="recycle")))
    return path


def script(*arguments):
    return slw("inspect", *arguments, cwd=ROOT)


def test_a_corpus_by_hand(folder, one):
    (facts,) = inspect_corpora([one + ".bin"], seq_length=16)
    assert facts == {
        "prefix": one,
        "documents": 4,
        "empty_documents": 1,
        "shortest_document": 0,
        "median_document": 80,  # of 0, 60, 100, 401
        "longest_document": 401,
        "tokens": 561,
        "dtype": "uint16",
        "vocab_size": None,
        "smallest_id": 0,
        "largest_id": 560,
        "samples": 35,
        "rest_tokens": 0,
    }
    text = describe_corpora([facts])
    assert "documents   4, 1 empty; shortest 0, median 80, longest 401 tokens" in text
    assert "ids         0 to 560, vocabulary not recorded" in text


def test_counting_in_blocks_changes_nothing(folder, monkeypatch):
    lengths = np.random.default_rng(5).integers(0, 9, 51)
    prefix = write(folder / "many", *lengths, first=3)
    whole = inspect_corpora([prefix])
    monkeypatch.setattr(inspection, "_TOKENS", 7)
    monkeypatch.setattr(inspection, "_DOCUMENTS", 4)
    assert inspect_corpora([prefix]) == whole
    (facts,) = whole
    assert facts["median_document"] == np.median(lengths)
    assert facts["empty_documents"] == np.count_nonzero(lengths == 0)
    assert (facts["shortest_document"], facts["longest_document"]) == (lengths.min(), lengths.max())
    assert (facts["smallest_id"], facts["largest_id"]) == (3, 2 + lengths.sum())


def test_the_document_of_a_token(one):
    corpus = IndexedCorpus(one)
    assert [corpus.document_at(position) for position in (0, 99, 100, 500, 501, 560)] == [0, 0, 2, 2, 3, 3]
    assert corpus.document_starts(1, 4).tolist() == [100, 100, 501, 561]


def test_ids_outside_a_vocabulary_and_documents_out_of_order_are_reported(folder):
    prefix = write(folder / "foreign", 20, 30)
    Path(prefix + ".json").write_text('{"vocab_size": 49}')
    facts = inspect_corpora([prefix])
    assert corpus_warnings(facts) == [f"{prefix}: has ids 0 to 49, outside the vocabulary it was made with, 0 to 48"]
    assert corpus_warnings(facts, 50)[1:] == []
    assert corpus_warnings(facts, 49)[1:] == [
        f"{prefix}: has ids 0 to 49, outside the vocabulary of the model, 0 to 48"
    ]
    prefix = write(folder / "disorder", 20, 30, 10)
    index = Path(prefix + ".idx")
    index.write_bytes(index.read_bytes()[:-32] + np.array([0, 2, 1, 3], "<i8").tobytes())
    with pytest.raises(DataError, match="document 2 starts at sequence 1, before document 1 at 2"):
        inspect_corpora([prefix])


def test_the_use_of_one_corpus_by_hand(one):
    summary = account(RunConfig.from_dict(run_file([one])))
    assert summary["splits"]["train"] == [{"prefix": one, "tokens": 561, "samples": 35}]
    assert summary["splits"]["valid"][0]["samples"] == 0
    # 5 steps each of 32, 56, 80, 104 tokens are 1,360; 2,640 more in 21 steps of 128. 41 steps are 328 samples.
    assert (summary["steps"], summary["sources"][0]["drawn_samples"]) == (41, 328)
    (source,) = summary["sources"]
    assert (source["weight"], source["share"], source["samples"], source["tokens"]) == (None, 1, 35, 560)
    # Epoch k begins with sample 35 k, in step 35 k // 8 + 1; 328 samples are 9 epochs and 13 of 35.
    assert source["epoch_steps"] == [1, 5, 9, 14, 18, 22, 27, 31, 36, 40]
    assert (summary["first_epoch_steps"], source["epochs"]) == (4, 9 + 13 / 35)
    drop = summary["ways"][0]
    assert (drop["read_tokens"], drop["trained_tokens"], drop["dropped_tokens"]) == (328 * 16, 4048, 328 * 16 - 4048)
    assert [way["configured"] for way in summary["ways"]] == [True, False, False, False, False]
    # Segments of 4, 7, 10, 13, 16 use 16, 14, 10, 13, 16: 640, 560, 400, 520 tokens in 20 steps, and 15 more of 128.
    segment = summary["ways"][2]
    assert (segment["method"], segment["steps"], segment["trained_tokens"]) == ("segment", 35, 4040)
    window = summary["ways"][4]
    assert (window["steps"], window["trained_tokens"], window["dropped_tokens"]) == (32, 4096, 0)


def brute_force(train_data):
    """For each source (rows, first row of each epoch, tokens read, trained on, recycled), step by step, token by token."""
    counts = [[0, [], 0, 0, 0] for _ in train_data.sources]
    for step in range(1, train_data.timeline.steps + 1):
        used = train_data.timeline.shortening.used_tokens_per_sample(train_data.timeline.seqlen(step))
        for source, epoch, number in zip(*train_data.sample_ids(step), strict=True):
            count = counts[source]
            if epoch == len(count[1]):
                count[1].append(count[0])
            count[0] += 1
            count[3] += used
            count[4] += used if number >= train_data.sources[source].num_samples else 0
    for number, source in enumerate(train_data.sources):
        stream, rows = train_data._streams[number], np.arange(counts[number][0])
        epochs, _ = stream.locate(rows)
        parts = stream.token_spans(rows, source.seq_length)
        spans = zip(epochs[parts.row], parts.range_index, parts.start, parts.length, strict=True)
        positions = [(epoch, of, start + at) for epoch, of, start, length in spans for at in range(length)]
        counts[number][2] = len(set(positions))
    return counts


@pytest.mark.parametrize("blend", [False, True])
def test_the_table_counts_what_is_read(one, two, blend):
    train = [[0.7, one], [0.3, two]] if blend else [one, two]
    summary = account(RunConfig.from_dict(run_file(train)))
    several_epochs = 0
    for way in summary["ways"]:
        train_data = open_training_data(RunConfig.from_dict(run_file(train, way["method"], way["leftovers"])))
        counts = brute_force(train_data)
        for number, (rows, begins, read, trained, recycled) in enumerate(counts):
            use = source_use(train_data, number, train_data.timeline, train_data.recycle)
            assert use.first_rows.tolist() == begins
            assert (use.samples, use.read_tokens, use.trained_tokens, use.recycled_tokens) == (
                rows,
                read,
                trained,
                recycled,
            )
            assert len(begins) - 1 < use.epochs <= len(begins)
            several_epochs += len(begins) > 2
        totals = [sum(count[column] for count in counts) for column in (2, 3, 4)]
        assert [way["read_tokens"], way["trained_tokens"], way["recycled_tokens"]] == totals
        assert way["dropped_tokens"] == totals[0] - totals[1]
        assert way["steps"] == train_data.timeline.steps
    assert several_epochs >= 5
    assert {way["recycled_tokens"] > 0 for way in summary["ways"]} == {True, False}


def test_epochs_begin_where_the_training_data_does(one, two):
    config = RunConfig.from_dict(run_file([[0.9, one], [0.1, two]], leftovers="recycle"))
    train_data = open_training_data(config)
    first = {}
    for step in range(1, train_data.timeline.steps + 1):
        for source, epoch, _ in zip(*(part.tolist() for part in train_data.sample_ids(step)), strict=True):
            first.setdefault((source, epoch), step)
    summary = account(config)
    for number, source in enumerate(summary["sources"]):
        assert source["epoch_steps"] == [step for (of, _), step in first.items() if of == number]
    assert summary["first_epoch_steps"] == first[0, 1] - 1
    assert [source["share"] for source in summary["sources"]] == [0.9, 0.1]


def test_a_file_without_steps_or_splits_of_its_own(one, two):
    whole = {name: part for name, part in run_file([one], tokens=9).items() if name in ("data", "curriculum_learning")}
    data = {"train": [one], "valid": [two], "seq_length": 16}
    summary = account(RunConfig.from_dict({**whole, "data": data}))
    assert summary["splits"] == {
        "train": [{"prefix": one, "tokens": 561, "samples": 35}],
        "valid": [{"prefix": two, "tokens": 306, "samples": 19}],
    }
    assert "ways" not in summary
    assert "need a training section" in describe_account(summary)
    short = account(RunConfig.from_dict(run_file([one], tokens=300, curriculum_learning=None)))
    assert (short["steps"], short["first_epoch_steps"]) == (3, None)  # 24 of 35 samples
    assert [way["method"] for way in short["ways"]] == ["truncate", "truncate"]
    assert "3 steps; no source starts a second epoch" in describe_account(short)


def test_a_run_of_427_617_steps_is_accounted_for_at_once(folder):
    prefix = write(folder / "long", *[50_000] * 40, vocab_size=2_000_001)  # 1,953 samples of 1,024
    file = ROOT / "configs" / "paper" / "gpt2_1.5b_bsz512_seqlen1k_slw270k.json"
    config = RunConfig.load(file, [f'data.train=["{prefix}"]', 'data.split="1"', "model.vocab_size=2000001"])
    started = time.perf_counter()
    summary = account(config)
    assert time.perf_counter() - started < 10  # some 70,000 epochs; with a corpus of the run's size it is 0.02 seconds
    assert (summary["steps"], summary["ways"][0]["epochs"]) == (427_617, [427_617 * 512 / 1953])
    assert len(summary["sources"][0]["epoch_steps"]) == 100


@pytest.mark.parametrize("method", ["truncate", "segment", "window"])
def test_a_step_is_what_the_training_data_reads(one, two, method):
    train_data = open_training_data(RunConfig.from_dict(run_file([[3, one], [1, two]], method, "recycle")))
    leftovers = 0
    for step in (1, 12, 18, train_data.timeline.steps):
        read = read_step(train_data, step, ranks=2, rows=3)
        assert [(rank["first_sample"], rank["samples"], len(rank["shown"])) for rank in read["ranks"]] == [
            (0, 4, 3),
            (4, 4, 3),
        ]
        for rank in read["ranks"]:
            inputs = train_data.read(step, rank["first_sample"], 3)[0].reshape(3, -1)
            sample_ids = np.stack(train_data.sample_ids(step, rank["first_sample"], 3), axis=1)
            for sample, tokens, sample_id in zip(rank["shown"], inputs.tolist(), sample_ids.tolist(), strict=True):
                assert [sample["source"], sample["epoch"], sample["number"]] == sample_id
                assert [token for ids in sample["ids"] for token in ids] == tokens
                assert {len(ids) for ids in sample["ids"][:-1]} <= {read["seqlen"]}
                first = 0 if sample["source"] == 0 else 1000
                spans = sample["stretches"]
                assert [first + at for part in spans for at in range(part["start"], part["end"])] == tokens
                assert {part["corpus"] for part in spans} == {(one, two)[sample["source"]]}
                leftovers += not sample["fresh"]
                assert sample["text"] is None
    assert method == "window" or leftovers


def test_a_step_in_documents_and_words(folder):
    """Bytes as tokens: what is shown is the text itself."""
    prefix = folder / "words"
    tokenizer = build_tokenizer(TokenizerChoice(train_vocab=257), [])
    ids = [tokenizer.encode(TEXT[start : start + 500]).ids for start in (0, 500, 1000)]
    with CorpusWriter(prefix, 257) as writer:
        for document in ids:
            writer.add_document(document)
        writer.add_file(".tokenizer.json", tokenizer.to_str().encode())
    encoded = TEXT[:1500].encode()
    curriculum = {
        "enabled": True,
        "min_difficulty": 100,
        "max_difficulty": 300,
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [100, 300], "max_step": [1]},
        "method": "segment",
    }
    file = run_file([str(prefix)], curriculum_learning=curriculum, train_batch_size=5)
    file["data"]["seq_length"] = 301
    train_data = open_training_data(RunConfig.from_dict(file))
    for step in (1, 2):
        read = read_step(train_data, step, rows=5)
        for sample in read["ranks"][0]["shown"]:
            (part,) = sample["stretches"]
            text = encoded[part["start"] : part["end"]].decode(errors="replace")
            assert "".join(sample["text"]).replace("\ufffd", "") == text.replace("\ufffd", "")
            ends = np.cumsum([len(document) for document in ids])
            assert part["documents"] == np.searchsorted(ends, [part["start"], part["end"] - 1], side="right").tolist()
        assert "5 samples over all ranks" in describe_step(read)
    text = describe_step(read)
    shown = read["ranks"][0]["shown"][0]["text"][0]
    assert f"    {shown[:100]!r} ... {shown[-100:]!r}" in text
    assert repr(shown) in describe_step(read, full=True)
    assert "each becomes 3 rows of 100 tokens" in describe_step(read_step(train_data, 1, rows=1))
    assert "and 4 more" in describe_step(read_step(train_data, 1, rows=1))


def test_on_the_command_line(folder, one, two, saved):
    picture = folder / "new" / "data.png"
    result = script("--config", saved, "--png", picture)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"{one}\n  documents   4, 1 empty" in result.stdout
    assert "weight 3, 75.000% of the samples" in result.stdout
    assert "\n* truncate  recycle " in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    step = script("--config", saved, "--step", 3, "--ranks", 4, "--rows", 1, "--json")
    assert json.loads(step.stdout) == read_step(open_training_data(RunConfig.load(saved)), 3, 4, 1)
    wrong = script("--config", saved, "--step", 3, "--ranks", 3)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == (
        "error: --ranks: 3 data-parallel ranks don't divide the 8 samples of step 3; give a divisor of 8\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PREFIX, --config: neither is given"),
        (["{one}", "--config", "{saved}"], r"PREFIX, --config: .*one and --config .* are both given"),
        (["{one}", "--seq-length", "0"], "--seq-length: 0 is not valid"),
        (["{one}", "--step", "3"], "--step 3: only used with the configuration file of a run"),
        (["{one}", "--png", "x.png"], "--png x.png: only used with the configuration file of a run"),
        (["{one}", "--set", "a=1", "--set", "b=2"], "--set a=1 b=2: only used with the configuration file of a run"),
        (["{one}", "nowhere"], "nowhere: no corpus here"),
        (["--config", "{saved}", "--rows", "0"], "--rows 0: only used with --step"),
        (["{saved}", "--step", "3", "--png", "x.png"], "--png x.png: not used with --step"),
        (["--config", "{saved}", "--png", "data.foo"], "--png data.foo: not the name of an image file"),
        (
            ["--config", "{saved}", "--png", "{saved}.png", "--set", "training=null"],
            "run.json.png: there are no steps",
        ),
        (["--config", "{saved}", "--seq-length", "8"], "--seq-length 8: only used with PREFIX"),
        (["--config", "{saved}", "--set", 'data.train=["nowhere"]'], "nowhere: no corpus, neither in .* nor in "),
        (["--config", "{saved}", "--step", "0"], r"--step: 0 is not a step of this run; its steps are 1 to \d+"),
        (["--config", "{saved}", "--step", "3", "--ranks", "0"], "--ranks: 0 data-parallel ranks"),
        (["--config", "{saved}", "--step", "3", "--rows", "0"], "--rows: 0 is not valid"),
        (["--config", "{saved}", "--step", "3", "--set", "training=null"], "training: section required"),
        (["--config", "{saved}", "--step", "3", "--set", "train_batch_size=null"], "train_batch_size: required"),
    ],
)
def test_mistakes_are_reported_before_any_work(arguments, message, one, saved):
    with pytest.raises((ConfigError, DataError), match=message):
        inspect.main([part.format(one=one, saved=saved) for part in arguments])
