"""A run's file as people write it: comments, paths beside it, and the folder of a run in its place."""

import difflib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import hjson
import numpy as np
import pytest
from helpers.settings import changed
from helpers.wrong_files import GOOD
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum import ConfigError, DataError, RunConfig, strict_json
from seqlen_curriculum.config.run_file import read_run_file
from seqlen_curriculum.data.from_config import open_run_data, open_samples
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.files import read_json
from seqlen_curriculum.strict_json import loads, without_comments

COMMENTED = """\ufeff{
  // a curriculum of "8" to 64 tokens, /* and no end
  "train_batch_size": 8, # rows
  "optimizer": {"type": "Adam", "params": {"lr": 1e-3 /* of 512 rows */,},},
  /* "fp16": {"enabled": true},
     "bf16": {} */
  "model": {"preset": "tiny-200k"},  // "data": {}
  "_comment": "// # /* */ , ] \\" # }",
  "_list": ["a,", [], {}, "]",
  ],
}
"""

# Any JSON, with "//", "#", quotes, commas and brackets in its texts.
TEXTS = st.text(alphabet=st.sampled_from('ab/#*,]}"\\ \n:'), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)
GAPS = st.sampled_from(["", " ", "\n", '// c ] " ,\n', "# c } '\n", '/* "a", /* ] \n */', "/**/"])


def write_as_people_do(value, draw):
    """``value`` as JSON with a comment or a space wherever one may stand, and with trailing commas."""

    def gap():
        return draw(GAPS)

    def last_comma(items):
        return gap() + "," if items and draw(st.booleans()) else ""

    def text(item):
        if isinstance(item, list):
            inner = ",".join(gap() + text(element) + gap() for element in item)
            return "[" + inner + last_comma(item) + gap() + "]"
        if isinstance(item, dict):
            inner = ",".join(f"{gap()}{json.dumps(key)}{gap()}:{gap()}{text(item[key])}{gap()}" for key in item)
            return "{" + inner + last_comma(item) + gap() + "}"
        return json.dumps(item)

    return gap() + text(value) + gap()


@given(value=st.dictionaries(TEXTS, VALUES, max_size=4), data=st.data())
def test_comments_and_trailing_commas_change_nothing_and_hjson_reads_the_same(value, data):
    text = write_as_people_do(value, data.draw)
    plain = without_comments(text)
    assert json.loads(plain) == value
    assert [character == "\n" for character in plain] == [character == "\n" for character in text]
    assert hjson.loads(text) == value


@given(VALUES)
def test_strict_json_stays_as_it_is(value):
    text = json.dumps(value, indent=1)
    assert without_comments(text) == text


def test_a_file_with_comments_is_read(tmp_path):
    (tmp_path / "run.json").write_text(COMMENTED, encoding="utf-8")
    raw = read_run_file(tmp_path / "run.json")
    assert raw["_comment"] == '// # /* */ , ] " # }'
    assert raw["_list"] == ["a,", [], {}, "]"]
    assert (raw["optimizer"]["params"]["lr"], "fp16" in raw, "data" in raw) == (1e-3, False, False)
    with pytest.raises(ConfigError, match="not valid JSON"):  # the files that a run writes stay strict
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{\n "fp16": tru\n}', "line 2, column 10"),
        ('{\n "lr": 1e-4x # y\n}', "line 2, column 12"),
        ("{\n  enabled: true,\n}", "line 2, column 3"),
        ("{'a': 1}", "line 1, column 2"),
        ('{"a": text without quotes\n}', "line 1, column 7"),
        ("{\"a\": '''\n many lines\n '''}", "line 1, column 7"),
        ('{ // c\n "a": 1\n "b": 2}', "line 3, column 2"),
        ('{"a": [,]}', "line 1, column 8"),
        ('{"a": [1,,]}', "line 1, column 10"),
        ('{"a": 1} /* c', "line 1, column 10"),
        ('{"a": 1 /*/}', "line 1, column 9"),
        ('{"a": "b}\n', "line 1, column "),
        ("// c", "line 1, column "),
    ],
)
def test_nothing_but_comments_and_commas_is_added_to_json(tmp_path, text, place):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.json: not valid JSON: .* at {place}"):
        RunConfig.load(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, // "a"\n "a": 2}', "key 'a' is given twice in one object; keep one (line 2, column 2)"),
        ('{"a": NaN /* */}', "a: NaN is not a JSON number; write a finite one (line 1, column 7)"),
        ('{"a": [0, {"b": [\n-Infinity]}],}', "a.1.b.0: -Infinity is not a JSON number; write a finite one (line 2, "),
        ('{"a": "b, \\"c",\n "d":\n  1e999,}', "d: 1e999 is too large for a number; write a smaller one (line 3, "),
        ('{"a": [1, 2], "b": {"c": {}, "d": [],\n\n "\\u0064": 1}}', "b: key 'd' is given twice in one object; "),
    ],
)
def test_what_json_must_not_hold_is_refused_beside_comments(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"run.json: {message}")):
        RunConfig.load(tmp_path / "run.json")


FIELDS = {  # any field, known or not: the place of a value X and the field that a message names
    '"train_batch_size": X': "train_batch_size",
    '"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "eps": X}}': "optimizer.params.eps",
    '"data": {"train": [[0.5, "a"], [X, "b"]], "seq_length": 8}': "data.train.1.0",
    '"somebodys": [0, X]': "somebodys.1",
}
VALUES_NO_PROGRAM_CAN_USE = {
    "9" * 310: r"9{59}\.\.\.9{9} is too large for a number",
    "9" * 400: r"9{59}\.\.\.9{9} is too large for a number",
    "-" + "9" * 10_000: r"-9{58}\.\.\.9{9} is too large for a number",
    "9" * 10_000 + ".5": r"9{59}\.\.\.9{7}\.5 is too large for a number",
    "1e400": "1e400 is too large for a number",
    "NaN": "NaN is not a JSON number",
    "-Infinity": "-Infinity is not a JSON number",
    r'"\ud800"': r"'\\ud800' has half of a surrogate pair",
    r'"a\u0000b"': r"'a\\x00b' has a NUL character",
    r'{"a\udfff": 1}': r"key 'a\\udfff' has half of a surrogate pair",
}


@pytest.mark.parametrize("value", VALUES_NO_PROGRAM_CAN_USE, ids=lambda value: value[:12])
@pytest.mark.parametrize("field", FIELDS)
def test_a_value_that_no_program_can_use_is_one_line_with_its_field(tmp_path, field, value):
    (tmp_path / "run.json").write_text("{" + field.replace("X", value) + "}")
    message = rf"^\S+run.json: {FIELDS[field]}: {VALUES_NO_PROGRAM_CAN_USE[value]}[;,] [^\n]{{1,99}}$"
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(tmp_path / "run.json")


@pytest.mark.parametrize("depth", [70, 900, 100_000])
@pytest.mark.parametrize(("brackets", "keys"), [("[]", r"(\.0)+"), (('{"a":', "}"), r"(\.a)+")])
def test_deep_nesting_is_one_line_with_its_field(tmp_path, brackets, keys, depth):
    value = brackets[0] * depth + "1" + brackets[1] * depth
    for field in ('"fp16": {"enabled": X}', '"somebodys": X'):
        (tmp_path / "run.json").write_text("{" + field.replace("X", value) + "}")
        name = "fp16.enabled" if "fp16" in field else "somebodys"
        with pytest.raises(ConfigError, match=rf"json: {name}{keys}\.\.\.: is nested more than 64 levels deep[^\n]+$"):
            RunConfig.load(tmp_path / "run.json")


def test_what_no_program_can_use_is_an_error_in_memory_too():
    for raw, message in (
        ({"train_batch_size": 10**10_000}, "train_batch_size: int that is too large to print is not valid"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 10**400}}}, r"optimizer.params.lr: 10{59}\.\.\.0{10} is not"),
        ({"data": {"train": ["a\0"], "seq_length": 8}}, r"data: train names 'a\\x00', which has a NUL character"),
        ({"data": {"train": ["b", "a\ud800"], "seq_length": 8}}, r"data: train names 'a\\ud800', which has half of"),
    ):
        with pytest.raises(ConfigError, match=message):
            RunConfig.from_dict(raw)
    for raw in ([], None, 3, "run.json"):
        with pytest.raises(ConfigError, match=rf"{re.escape(repr(raw))} is not a configuration; give a mapping"):
            RunConfig.from_dict(raw)


def test_a_path_that_can_not_be_read_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"can't be read \(File name too long\)"):
        RunConfig.load(tmp_path / ("a" * 5000))

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "run.json").write_text("{}")
    for method in ("open", "is_dir"):  # a closed file, and a file in a closed folder; root may read both
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, closed)
            with pytest.raises(ConfigError, match=r"run.json: can't be read \(Permission denied\); give"):
                RunConfig.load(tmp_path / "run.json")


def outcome(read, *arguments):
    """Return (result, no problems), or (None, the problems)."""
    try:
        return read(*arguments), []
    except ConfigError as error:
        return None, error.problems


@pytest.mark.parametrize(
    "sections",
    [
        lambda keys: keys,
        lambda keys: {"training": {"train_tokens": 1000, **keys}},
        lambda keys: {"model": keys},
        lambda keys: {"optimizer": {"type": "Adam", "params": keys}},
        lambda keys: {"curriculum_learning": {"enabled": True, "schedule_type": "fixed_linear", **keys}},
    ],
)
@pytest.mark.parametrize("name", ["key_{}", "trainin{}", "lr{}"])
def test_a_file_of_20_000_keys_is_compared_with_few_names(monkeypatch, sections, name):
    compared = 0

    def counted(*args, **kwargs):
        nonlocal compared
        compared += len(args[1])
        return close_matches(*args, **kwargs)

    close_matches = difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", counted)
    _, problems = outcome(RunConfig.from_dict, sections({name.format(number): 1 for number in range(20_000)}))
    assert len(problems) <= 110
    assert sum(map(len, problems)) < 50_000
    assert compared < 4000


def test_the_configuration_of_a_run_with_corpora_for_validation_can_be_read_again():
    for sections in (
        {"valid": ["/corpora/v"]},
        {"valid": ["/corpora/v"], "test": ["/corpora/t"]},
        {"test": ["/corpora/t"], "split": "9,1"},
    ):
        config = RunConfig.from_dict({**GOOD, "data": {"train": ["/corpora/w"], "seq_length": 64, **sections}})
        assert RunConfig.from_dict(json.loads(json.dumps(config.as_file()))) == config


def test_a_wrong_number_in_a_flag_has_its_key(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError, match=r"--set 'model=.*: layers\.0: NaN is not a JSON number"):
        RunConfig.load(tmp_path / "run.json", ['model={"layers": [NaN]}'])


@given(VALUES)
def test_strict_json_without_duplicates_is_accepted(value):
    assert loads(json.dumps(value)) == value


def test_every_key_is_looked_up_once(monkeypatch):
    """20,000 keys: comparing each with all others would take 4e8 comparisons."""
    compared = 0

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    reading = SimpleNamespace(
        loads=lambda text, **hooks: Key(json.loads(text)) if text[0] == '"' else json.loads(text, **hooks),
        JSONDecodeError=json.JSONDecodeError,
    )
    monkeypatch.setattr(strict_json, "json", reading)
    assert len(loads(json.dumps({f"key{number}": number for number in range(20_000)}))) == 20_000
    assert compared < 20_000


def test_the_schema_of_the_file_is_no_setting(tmp_path):
    named = RunConfig.from_dict({"$schema": "../run.schema.json", **GOOD})
    plain = RunConfig.from_dict(GOOD)
    assert named == plain
    assert named.settings() == plain.settings()
    assert "$schema" not in {**named.deepspeed, **named.as_file()}


# The folder of a run


def record_of(config, folder, **more):
    folder.mkdir()
    launches = [
        {"started": "2026-01-01T00:00:00+00:00", "ranks": 2},
        {"started": "2026-01-02T00:00:00+00:00", "ranks": 4},
    ]
    (folder / "run.json").write_text(json.dumps({"config": config.as_file(), "launches": launches, **more}))


def test_the_record_of_a_run_is_a_configuration(tmp_path, capsys):
    config = RunConfig.from_dict(GOOD)
    record_of(config.for_ranks(4), tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a" / "run.json"):
        again = RunConfig.load(path, ["training.eval_interval=7"])
        assert again.settings() == config.settings()
        assert (again.training.eval_interval, again.timeline().steps) == (7, config.timeline().steps)
        note = capsys.readouterr().err
        assert note == (
            f"note: {tmp_path / 'a' / 'run.json'}: a run's record; using the configuration of launch 2, started "
            "2026-01-02T00:00:00+00:00\n"
        )
        for ranks in (1, 2, 4):  # the micro-batches of 2 rows on each rank are fewer or more
            assert again.for_ranks(ranks).deepspeed["gradient_accumulation_steps"] == 4 // ranks
    assert RunConfig.load(tmp_path / "a").for_ranks(4).deepspeed == config.for_ranks(4).deepspeed


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=rf"{tmp_path}: a folder without run\.json"):
        RunConfig.load(tmp_path)


# Paths


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A file in ``project/``, a corpus beside it, and the current folder another one."""
    (tmp_path / "project" / "corpus").mkdir(parents=True)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    make_corpus(tmp_path / "project" / "corpus" / "x")
    (tmp_path / "project" / "f.json").write_text(json.dumps(GOOD))
    return tmp_path


def make_corpus(prefix):
    prefix.parent.mkdir(exist_ok=True)
    with CorpusWriter(prefix, 100) as writer:
        for _ in range(50):
            writer.add_document(np.arange(100))


@pytest.mark.parametrize("path", ["../project/f.json", "{elsewhere}/project/f.json"])
def test_corpora_are_found_in_the_current_folder_first_then_beside_the_file(elsewhere, path):
    path = path.format(elsewhere=elsewhere)
    config = RunConfig.load(path, ['data.valid=["corpus/y"]'])
    assert [Path(prefix).resolve() for prefix in config.data.prefixes] == [elsewhere / "project" / "corpus" / "x"]
    assert len(open_samples(config, "train").ranges) == 1
    # what is recorded of it holds in every folder, also for what isn't there yet
    recorded = config.as_file()["data"]
    assert recorded["train"] == [str(elsewhere / "project" / "corpus" / "x")]
    assert recorded["valid"] == [str(elsewhere / "cwd" / "corpus" / "y")]
    make_corpus(elsewhere / "cwd" / "corpus" / "x")
    assert RunConfig.load(path).data.prefixes == ["corpus/x"]


def test_weighted_corpora_are_found_as_well(elsewhere):
    config = RunConfig.load("../project/f.json", ['data.train=[[1, "corpus/x"], [2, "/nowhere"]]'])
    assert config.data.train == [(1.0, "../project/corpus/x"), (2.0, "/nowhere")]


def test_a_corpus_in_neither_place_is_an_error_that_names_both(elsewhere):
    both = rf"corpus/z: no corpus, neither in {elsewhere}/cwd nor in {elsewhere}/project, the folder of the run's file"
    for key in ("train", "valid", "test"):
        config = RunConfig.load("../project/f.json", [f'data.{key}=["corpus/z"]'])
        with pytest.raises(DataError, match=both):
            open_samples(config, key)
    with pytest.raises(DataError, match=both):
        open_run_data(RunConfig.load("../project/f.json", ['data.train=["corpus/z"]']))


def test_a_model_folder_in_neither_place_is_an_error_that_names_both(elsewhere):
    names = re.escape(f"neither in {elsewhere}/cwd nor in {elsewhere}/project")
    with pytest.raises(ConfigError, match=rf"model\.hf_checkpoint: no folder 'gpt2', {names}"):
        RunConfig.load("../project/f.json", ["model.hf_checkpoint=gpt2"])


def test_a_model_folder_is_found_beside_the_file(elsewhere):
    (elsewhere / "project" / "gpt2").mkdir()
    raw = read_run_file("../project/f.json", ["model.hf_checkpoint=gpt2"])
    assert raw["model"]["hf_checkpoint"] == "../project/gpt2"


def test_values_of_another_type_are_left_to_the_checks(elsewhere):
    raw = changed(GOOD, data=[1], model="gpt2")
    (elsewhere / "project" / "f.json").write_text(json.dumps(raw))
    assert read_run_file("../project/f.json") == raw
    sections = ["data={}", "data.seq_length=64", 'model={"preset": "tiny-200k"}']
    for value in ("5", "null", '[["a"]]', "{}"):
        with pytest.raises(ConfigError, match=r"data\.train: "):
            RunConfig.load("../project/f.json", [*sections, f"data.train={value}"])


def test_a_misspelt_section_is_one_problem(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"train_batch_size": 4, "trainng": {}}')
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path, require=("training", "data"))
    problems = ["data: section required, but not given", "trainng: unknown key; did you mean 'training'?"]
    assert caught.value.problems == problems


def test_a_missing_file_is_named_once(tmp_path):
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/none: can't be read \(No such file or directory\); give"):
        RunConfig.load(tmp_path / "none")


@pytest.mark.parametrize("path", ["/dev/zero", "corpus.json"])
def test_a_file_without_end_is_not_read_whole(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.json").write_text('{"text": "a document"}\n' * 2**18)
    with pytest.raises(
        ConfigError, match=rf"{path}: has more than 4,194,304 characters; give the path of a run's JSON"
    ):
        RunConfig.load(path)


class TestNamesInMessages:
    """Keys are of anybody's making: they can't move the cursor, hide text, look like another line, or fill the screen."""

    @pytest.mark.parametrize("key", ["a\nerror: b", "a\x1b[2J", "a\u202eb", "a\u2028b"])
    def test_no_character_of_a_key_is_obeyed(self, tmp_path, key):
        for section in ("training", "model", "scheduler"):
            (tmp_path / "run.json").write_text(json.dumps(changed(GOOD, **{f"{section}__{key}": 1})))
            with pytest.raises(ConfigError, match="unknown key") as found:
                RunConfig.load(tmp_path / "run.json")
            assert str(found.value).isprintable()
        (tmp_path / "run.json").write_text(json.dumps({**GOOD, key: 1}))
        (warning, *_) = RunConfig.load(tmp_path / "run.json").warnings()
        assert "no effect on this run: a" in warning
        assert warning.isprintable()
        (tmp_path / "run.json").write_text(json.dumps({"b": {key: float("nan")}}))
        with pytest.raises(ConfigError, match="NaN is not a JSON number") as found:
            RunConfig.load(tmp_path / "run.json")
        assert str(found.value).isprintable()

    def test_a_long_key_or_override_is_cut(self, tmp_path):
        (tmp_path / "run.json").write_text(json.dumps(changed(GOOD, **{"training__" + "x" * 9_000: 1})))
        with pytest.raises(ConfigError, match=r"training\.x+\.\.\.x+: unknown key") as found:
            RunConfig.load(tmp_path / "run.json")
        assert len(str(found.value)) < 700
        for override in ("x." + "y" * 9_000, "optimizer.type.x=1", "train_batch_size.=" + "1" * 9_000):
            with pytest.raises(ConfigError, match="--set ") as found:
                RunConfig.load(next(Path("configs").rglob("tiny*.json")), [override])
            assert len(str(found.value)) < 300
