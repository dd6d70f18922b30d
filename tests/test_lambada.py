"""LAMBADA, strict: how a passage is split, which lines are refused, what the numbers are; by hand."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from helpers.shared_data import shared
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.evaluation.lambada import read_lambada, split_last_word
from seqlen_curriculum.evaluation.task import Limits, Scores


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TokenizerChoice(train_vocab=257), [])


@pytest.fixture
def lines(tmp_path):
    def write(*texts):
        path = tmp_path / "lambada.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.mark.parametrize(
    ("text", "context", "target"),
    [
        ("I don't care about signs", "I don't care about", " signs"),
        ("on my own, Shane\n", "on my own,", " Shane"),
        ("she said:\n\nyes", "she said:", " yes"),  # white space of any kind splits, a space is put before the word
        ("  no  no ", "no", " no"),  # the last of the same words
        ("word", "", " word"),
        (" \n", "", " "),
    ],
)
def test_the_last_word_is_split_off(text, context, target):
    assert split_last_word(text) == (context, target)


@given(
    st.lists(st.text("ab\N{LATIN SMALL LETTER E WITH ACUTE}.", min_size=1, max_size=4), min_size=2, max_size=6),
    st.text(" \n\t", max_size=3),
)
def test_context_and_target_are_the_words(words, end):
    context, target = split_last_word(" ".join(words) + end)
    assert f"{context}{target}".split() == words
    assert target == " " + words[-1]


def test_rows_and_numbers_by_hand(lines, tokenizer):
    prepared = read_lambada(lines("ab c", "a bcd", "abcdefgh i"))(tokenizer, Limits(seqlen=6))
    # bytes: "ab" + " c", "a" + " bcd", and of "abcdefgh" + " i" the last 7
    assert [(len(row.tokens), row.targets) for row in prepared.rows] == [(4, 2), (5, 4), (7, 2)]
    assert tokenizer.decode(prepared.rows[2].tokens.tolist()) == "defgh i"
    result = prepared.result(Scores(np.array([1.0, 2.0, 3.0]), np.array([True, False, True])))
    assert (result["right"], result["items"], result["targets"], result["items_cut"]) == (2, 3, 8, 1)
    assert result["accuracy"] == 2 / 3
    assert result["loss"] == 6 / 8
    assert result["perplexity"] == math.exp(6 / 8)
    assert result["adjusted_perplexity"] == math.exp(6 / 3)  # of a word
    assert not result["partial"]


def test_an_item_that_just_fits_is_whole(lines, tokenizer):
    # 7 tokens are 6 inputs, the last is a target only
    task = read_lambada(lines("abcde f"))
    assert task(tokenizer, Limits(seqlen=6)).result(_none(1))["items_cut"] == 0
    assert task(tokenizer, Limits(seqlen=5)).result(_none(1))["items_cut"] == 1


def test_a_part_says_so(lines, tokenizer):
    task = read_lambada(lines("a b", "c d", "e f"))
    result = task(tokenizer, Limits(seqlen=8, limit=2)).result(_none(2))
    assert (result["items"], result["items_in_all"], result["partial"]) == (2, 3, True)
    assert not task(tokenizer, Limits(seqlen=8, limit=3)).result(_none(3))["partial"]


def _none(rows):
    return Scores(np.zeros(rows), np.zeros(rows, dtype=bool))


def test_a_word_longer_than_the_model_reads_is_refused(lines, tokenizer):
    task = read_lambada(lines("a b", "a bcde"))
    assert len(task(tokenizer, Limits(seqlen=5)).rows[1].tokens) == 6  # " bcde" and one token of context
    with pytest.raises(DataError, match=r"line 2: the last word ' bcde' is 5 tokens, but the context is 4"):
        task(tokenizer, Limits(seqlen=4))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"text": "a b"}\n{"text": "a', "line 2: not an object with a text"),
        ('{"text": "a b"}\n\n{"txt": "a b"}', "line 3: not an object with a text"),
        ("[1]", "line 1: not an object with a text"),
        ('{"text": 5}', "line 1: its text is 5"),
        ('{"text": "word"}', "line 1: 'word' has no context before its last word"),
        ("\n", "is empty"),
    ],
)
def test_lines_that_are_no_items(tmp_path, text, problem):
    path = tmp_path / "lambada.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=problem) as error:
        read_lambada(path)
    assert f"--task lambada={path}" in str(error.value)


def test_target_lengths_of_the_test_set():
    files = TokenizerChoice(shared("gpt2-bpe/encoder.json"), shared("gpt2-bpe/vocab.bpe"))
    task = read_lambada(shared("lambada/lambada_test.jsonl"))
    rows = task(build_tokenizer(files, []), Limits(seqlen=1024)).rows
    assert Counter(row.targets for row in rows) == {1: 4013, 2: 913, 3: 208, 4: 16, 5: 3}
    assert len(rows) == 5153


def test_line_ends_and_a_byte_order_mark_do_not_change_the_items(lines, tokenizer):
    path = lines("I don't care about signs", "on my own, Shane")
    plain = path.read_bytes()
    expected = [row.tokens.tolist() for row in read_lambada(path)(tokenizer, Limits(seqlen=64)).rows]
    for spelling in (b"\xef\xbb\xbf" + plain, plain.replace(b"\n", b"\r\n")):
        path.write_bytes(spelling)
        assert [row.tokens.tolist() for row in read_lambada(path)(tokenizer, Limits(seqlen=64)).rows] == expected
