"""WikiText-103: its detokenizer, windows and adjusted perplexity, by hand and against lm-eval's copy of the rules."""

import math

import numpy as np
import pytest
from helpers.shared_data import shared
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.evaluation.task import Limits, Scores
from seqlen_curriculum.evaluation.wikitext import Window, detokenize, read_wikitext103, windows


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TokenizerChoice(train_vocab=257), [])


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("a guest @-@ starring role", "a guest-starring role"),
        ("1 @,@ 234 @.@ 5 km", "1,234.5 km"),
        ("film , television ; he said : no ! why ? yes .", "film, television; he said: no! why? yes ."),
        ("no . \n yes", "no.\nyes"),
        ("the boys ' club", "the boys' club"),
        ("Teddy 's Story", "Teddy's Story"),
        ("( born 1950 ) [ sic ] { x }", "(born 1950) [sic] {x}"),
        ('as " Craig " in', 'as "Craig" in'),
        (" = = = Plot = = = \n", " === Plot ===\n"),
        (" = = Plot = = \n = Title = \n", " == Plot ==\n= Title =\n"),
        ("20 \N{DEGREE SIGN} C", "20\N{DEGREE SIGN}C"),
        ("a N b", "a 1 b"),
        ("plain text", "plain text"),
    ],
)
def test_text_is_as_people_write_it(raw, text):
    assert detokenize(raw) == text


_PIECES = st.sampled_from(
    [*"abN059 '\"()[]{}=:;.!?,@-/\n\N{DEGREE SIGN}", " s ' ", " @-@ ", "/' 5/", " = = ", " 's", "  "]
)


@given(st.lists(_PIECES, max_size=60).map("".join))
def test_any_text_is_as_in_lm_evals_copy_of_the_rules(text):
    rules = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    assert detokenize(text) == rules.wikitext_detokenizer({"page": text})


def test_windows_by_hand():
    # 11 tokens have 10 targets: the first window predicts 1 to 4, then each 2 more; two windows are past the end
    assert windows(11, 4, 2) == [(0, 5, 4), (2, 7, 2), (4, 9, 2), (6, 11, 2), (8, 11, 0)]
    # 12 tokens: the last window but one has one target left
    assert windows(12, 4, 2)[-2:] == [(8, 12, 1), (10, 12, 0)]
    assert windows(11, 4, 4) == [(0, 5, 4), (4, 9, 4), (8, 11, 2)]
    assert windows(5, 8, 3) == [(0, 5, 4), (3, 5, 0)]
    assert windows(2, 1, 1) == [Window(0, 2, 1)]


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 40))
def test_every_target_is_scored_once_with_all_the_context_there_is_room_for(tokens, seqlen, overlap):
    overlap = min(overlap, seqlen)
    scored = np.zeros(tokens, dtype=int)
    for start, stop, targets in windows(tokens, seqlen, overlap):
        assert 0 <= start < stop <= tokens
        assert stop - start <= seqlen + 1
        assert start == 0 or targets <= overlap
        scored[stop - targets : stop] += 1
        assert targets == 0 or stop - targets - start >= min(seqlen - overlap + 1, stop - targets)
    assert scored.tolist() == [0] + [1] * (tokens - 1)
    assert len(windows(tokens, seqlen, overlap)) == math.ceil((tokens - 1) / overlap)


def test_numbers_by_hand(tmp_path, tokenizer):
    path = tmp_path / "wiki.tokens"
    path.write_text(" \n ab @-@ cd , e \n ")
    # words: "ab", "@-@", "cd", ",", "e"; text " \n ab-cd, e \n " without spaces around ends of line: "\nab-cd, e\n"
    prepared = read_wikitext103(path)(tokenizer, Limits(seqlen=4, overlap=2))
    assert [len(row.tokens) for row in prepared.rows] == [5, 5, 5, 4, 2]
    nll = np.array([4.0, 1.0, 1.0, 0.0, 0.0])
    result = prepared.result(Scores(nll, np.zeros(5, dtype=bool)))
    assert result["targets"] == result["targets_in_all"] == 9
    assert result["words"] == 5
    assert result["loss"] == pytest.approx(6 / 9)
    assert result["perplexity"] == pytest.approx(math.exp(6 / 9))
    assert result["adjusted_perplexity"] == pytest.approx(math.exp(6 / 9 * 9 / 4))
    assert not result["partial"]


def test_a_part_says_so_and_keeps_the_whole_ratio(tmp_path, tokenizer):
    path = tmp_path / "wiki.tokens"
    path.write_text("abc def ghi")  # 11 tokens of bytes, 3 words
    prepared = read_wikitext103(path)(tokenizer, Limits(seqlen=4, overlap=2, limit=2))
    result = prepared.result(Scores(np.array([3.0, 3.0]), np.zeros(2, dtype=bool)))
    assert (result["windows"], result["windows_in_all"], result["partial"]) == (2, 5, True)
    assert result["loss"] == 1.0  # of 4 + 2 targets
    assert result["adjusted_perplexity"] == pytest.approx(math.exp(10 / 2))


def test_perplexity_ends_at_e_to_the_20(tmp_path, tokenizer):
    path = tmp_path / "wiki.tokens"
    path.write_text("abc def")
    prepared = read_wikitext103(path)(tokenizer, Limits(seqlen=8, overlap=8))
    assert prepared.result(Scores(np.array([600.0]), np.zeros(1, dtype=bool)))["perplexity"] == math.exp(20)


@pytest.mark.parametrize(
    ("data", "message"), [(b"word", "has 1 words"), (b"one two\n\xff", "line 2: not UTF-8"), (None, "No such file")]
)
def test_files_that_are_no_such_text(tmp_path, data, message):
    path = tmp_path / "wiki.tokens"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_wikitext103(path)
    assert f"--task wikitext103={path}" in str(error.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"overlap": 0}, "--overlap: 0 "),
        ({"overlap": 5}, r"--overlap: 5 .*\b4\b"),
        ({"overlap": 4, "limit": 0}, "--limit: 0 "),
    ],
)
def test_limits_out_of_range(limits, message):
    with pytest.raises(ConfigError, match=message):
        Limits(seqlen=4, **limits)
    Limits(seqlen=4, overlap=1, limit=1)
    Limits(seqlen=4, overlap=4)


def test_counts_of_the_test_file():
    files = TokenizerChoice(shared("gpt2-bpe/encoder.json"), shared("gpt2-bpe/vocab.bpe"))
    task = read_wikitext103(shared("wikitext-103/wikitext-103.wiki.test.tokens"))
    prepared = task(build_tokenizer(files, []), Limits(seqlen=1024, overlap=1024))
    result = prepared.result(Scores(np.full(264, 1.0), np.zeros(264, dtype=bool)))
    assert (result["words"], result["targets"], result["windows"]) == (245_566, 270_329, 264)
    assert result["adjusted_perplexity"] == pytest.approx(math.exp(264 / 245_565))
    for overlap, number in ((32, 8448), (256, 1056), (1024, 264)):
        cut = windows(270_330, 1024, overlap)
        assert (len(cut), sum(window.targets for window in cut)) == (number, 270_329)


def test_line_ends_and_a_byte_order_mark_do_not_change_the_task(tmp_path, tokenizer):
    path = tmp_path / "wiki.test.tokens"
    plain = b" \n = Title = \n \n Some words , and more . \n The last line . \n"
    path.write_bytes(plain)
    expected = read_wikitext103(path)(tokenizer, Limits(seqlen=16))
    for spelling in (b"\xef\xbb\xbf" + plain, plain.replace(b"\n", b"\r\n"), plain.replace(b"\n", b"\r")):
        path.write_bytes(spelling)
        task = read_wikitext103(path)(tokenizer, Limits(seqlen=16))
        assert [row.tokens.tolist() for row in task.rows] == [row.tokens.tolist() for row in expected.rows]
        assert (task.words, task.targets_in_all) == (expected.words, expected.targets_in_all)
