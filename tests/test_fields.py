"""Groups of flags, suggestions for misspelt names, and the text of a section's problems."""

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Count, Flags, flag, flat, misspelt_sections, nearest, suggest


class Drawing(Flags):
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: Count = 100
    seed: int | None = None

    @model_validator(mode="after")
    def _seeded(self):
        if self.seed == self.max_tokens:
            raise ValueError(f"--seed: {self.seed} equals --max-tokens; give another")
        return self


def test_flags_take_their_values_and_defaults():
    assert (Drawing(top_p=1).top_p, Drawing().max_tokens, Drawing(max_tokens=5.0).max_tokens) == (1, 100, 5)
    assert flag("max_new_tokens") == "--max-new-tokens"


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({"top_p": 0}, ["--top-p: 0 "]),
        ({"top_p": float("nan")}, ["--top-p: nan "]),
        ({"max_tokens": 0, "top_p": 1.5}, ["--top-p: 1.5 ", "--max-tokens: 0 "]),
        ({"seed": 100}, ["--seed: 100 equals --max-tokens"]),
        ({"top_q": 1.0}, ["--top-q: unknown key; did you mean 'top_p'?"]),
    ],
)
def test_problems_of_flags_name_flag_and_value(values, problems):
    with pytest.raises(ConfigError) as caught:
        Drawing(**values)
    assert len(caught.value.problems) == len(problems)
    assert all(line.startswith(problem) for line, problem in zip(caught.value.problems, problems, strict=True))


def test_suggestions():
    assert suggest("trainning", ["training", "data"]) == "training"
    assert suggest("trainning", ["training"], cutoff=0.99) is None
    assert nearest("117m", ["gpt2-117m", "gpt2-345m"]) == "; did you mean 'gpt2-117m'?"
    assert nearest("sed", ["seed", "split"]) == "; did you mean 'seed'?"
    assert nearest("x", ["max_step", "seed"]) == "; valid names: max_step, seed"
    assert nearest("", ["b", "a"]) == "; valid names: a, b"


def test_misspelt_sections_are_found_among_keys_of_others():
    raw = {"trainning": {}, "_training": {}, "wall_clock_breakdown": True, "data": {}}
    assert misspelt_sections(raw, ["training", "data"]) == ["trainning: unknown key; did you mean 'training'?"]


def test_flat_names_leaves_by_their_path():
    assert dict(flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3})) == {"a.b": 1, "a.c.d": 2, "e": 3}


@given(st.text("abcdeflrz_1", max_size=9), st.lists(st.text("abcdeflrz_1", max_size=9), max_size=5))
def test_a_suggestion_is_the_one_of_difflib(name, names):
    for cutoff in (0.6, 0.8, 0.85):
        expected = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
        assert suggest(name, names, cutoff) == (expected[0] if expected else None)
