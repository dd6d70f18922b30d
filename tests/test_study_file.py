"""The file of a study: what its runs are, and mistakes that are reported before any of them starts."""

import json

import pytest
from helpers.command import slw

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.shipped import shipped_configs, shipped_studies
from seqlen_curriculum.study.cost import arm_costs, cost_table
from seqlen_curriculum.study.plan import merge_patch
from seqlen_curriculum.study.study_file import comparison_warnings, read_study
from seqlen_curriculum.tuning.cost import cost_of

STUDY = {
    "run": "run.json",
    "cases": {"constant": {"curriculum_learning": None}, "slw": {}},
    "variants": {"tokens": {"scheduler": {"params": {"warmup_steps": None, "warmup_tokens": 1000}}}, "steps": {}},
    "rates": [1e-3, 5e-3],
    "tuning_seeds": [11],
    "seeds": [1, 2, 3],
}


@pytest.fixture
def study(tmp_path, tiny_run):
    """Return a function that writes STUDY with changed keys beside its run, and returns the file; None removes a key."""
    (tmp_path / "run.json").write_text(json.dumps(tiny_run))

    def write(**changes):
        content = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
        (tmp_path / "study.json").write_text(json.dumps(content))
        return tmp_path / "study.json"

    return write


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # the examples of RFC 7386, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch(target, patch, result):
    before = json.dumps([target, patch])
    assert merge_patch(target, patch) == result
    assert json.dumps([target, patch]) == before


def test_the_runs_are_cases_with_variants_at_rates_on_seeds(study):
    plan = read_study(study())
    assert [arm.name for arm in plan.arms] == ["constant.tokens", "constant.steps", "slw.tokens", "slw.steps"]
    assert len(plan.tuning_runs()) == 4 * 2 * 1
    first, second = plan.tuning_runs()[:2]
    assert (first.name, second.name) == ("constant.tokens/lr0.001-seed11", "constant.tokens/lr0.005-seed11")
    assert first.raw["optimizer"]["params"] == {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}
    assert first.raw["scheduler"]["params"] == {"warmup_tokens": 1000, "min_lr": 1e-4}
    assert "curriculum_learning" not in first.raw
    measured = plan.measured_runs({"slw.steps": 5e-3, "constant.tokens": 1e-3})
    assert [(run.arm.name, run.rate, run.seed) for run in measured] == [
        (name, rate, seed) for seed in (1, 2, 3) for name, rate in (("constant.tokens", 1e-3), ("slw.steps", 5e-3))
    ]
    assert {run.raw["training"]["seed"] for run in measured} == {1, 2, 3}
    assert len({run.name for run in [*plan.tuning_runs(), *measured]}) == 8 + 6


def test_without_rates_each_case_keeps_its_own(study):
    plan = read_study(
        study(rates=None, tuning_seeds=None, variants=None, cases={"a": {}, "b": {"gradient_clipping": 2}})
    )
    assert plan.tuning_runs() == []
    runs = plan.measured_runs({"a": None, "b": None})
    assert [run.name for run in runs[:2]] == ["a/seed1", "b/seed1"]
    assert {run.raw["optimizer"]["params"]["lr"] for run in runs} == {5e-3}
    assert [run.raw["gradient_clipping"] for run in runs[:2]] == [1.0, 2]


def test_the_reference_is_a_case_or_one_of_its_variants(study):
    assert [arm.name for arm in read_study(study()).references()] == ["constant.tokens", "constant.steps"]
    assert [arm.name for arm in read_study(study(reference="slw.steps")).references()] == ["slw.steps"]


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"rats": [1]}, ["rats: unknown key; did you mean 'rates'?"]),
        ({"seeds": None}, ["seeds: required"]),
        ({"seeds": []}, ["seeds: [] is not valid"]),
        ({"cases": {}}, ["cases: {} is not valid"]),
        ({"cases": {"a b": {}}}, ["cases.a b: 'a b' is not valid as", "use letters, digits"]),
        ({"cases": {"a": 3}}, ["cases.a: 3 is not an object"]),
        ({"seeds": [1, 11]}, ["seeds: 11 is one of tuning_seeds too"]),
        ({"seeds": [1, 1]}, ["seeds: 1 is given twice"]),
        ({"rates": [1e-3, -1.0]}, ["rates.1: -1.0 is not valid"]),
        ({"tuning_seeds": None}, ["tuning_seeds: required with rates"]),
        ({"rates": None}, ["tuning_seeds: have no effect without rates"]),
        ({"reference": "slww"}, ["reference: 'slww' is not a case; did you mean"]),
        ({"run": "tiny_cpv"}, ["run: 'tiny_cpv' is neither a file nor a shipped", "did you mean 'tiny_cpu'?"]),
        ({"cases": {"a": {"training": {"seed": 3}}}}, ["cases.a.training.seed: the study sets it"]),
        ({"cases": {"a": {"optimizer": {"params": {"lr": 3}}}}}, ["cases.a.optimizer.params.lr: rates sets it"]),
        ({"cases": {"a": {"training": {"eval_interval": 0}}}}, ["a.tokens: training.eval_interval: required"]),
        (
            {"cases": {"a": {"data": {"seq_lenght": 3}}}},
            ["a.tokens: data.seq_lenght: unknown key", "a.steps: data.seq"],
        ),
        (
            {"variants": None, "cases": {"a": {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0}}}}},
            ["a: scheduler.params.warmup_max_lr: replaces optimizer.params.lr"],
        ),
        (  # its default does so too
            {
                "variants": None,
                "cases": {"a": {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 46}}}},
            },
            ["a: scheduler.params.warmup_max_lr: replaces optimizer.params.lr"],
        ),
        (
            {
                "cases": {
                    "a": {},
                    "b": {"curriculum_learning": None, "data": {"seq_length": 16}, "training": {"eval_rows": 3}},
                }
            },
            [
                "b.tokens: data.seq_length: 16, but a.tokens has 32; validation losses are compared",
                "b.steps: training.eval_rows: 3, but a.tokens has",
            ],
        ),
        (
            {"variants": None, "cases": {"a": {}, "b": {"data": {"attention": "document", "eod_mask_loss": True}}}},
            ["b: data.eod_mask_loss: true, but a has false"],
        ),
        ({"seeds": list(range(100, 5000))}, ["cases: with variants, rates and seeds these are 19,608 runs"]),
    ],
)
def test_mistakes(study, changes, messages):
    if "Warmup" in str(changes):
        changes["cases"]["a"]["scheduler"]["params"] |= {"warmup_steps": None, "min_lr": None}
    with pytest.raises(ConfigError) as raised:
        read_study(study(**changes))
    for message in messages:
        assert message in str(raised.value)
    assert str(raised.value).startswith(str(study().parent))


def test_paths_in_a_patch_may_be_beside_the_study(study, tmp_path, corpus, tiny_run):
    for name in ("mine", "held_out"):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{name}{suffix}").symlink_to(f"{corpus}{suffix}")
    valid = {"data": {"split": None, "valid": ["held_out"]}}
    cases = {"constant": {}, "mine": {"data": {"train": ["mine"]}}}
    plan = read_study(study(cases=cases, variants={"valid": valid}))
    assert [arm.raw["data"]["train"] for arm in plan.arms] == [tiny_run["data"]["train"], [str(tmp_path / "mine")]]


def test_other_attention_is_a_warning(study):
    cases = {"a": {}, "b": {"data": {"attention": "document"}}}
    (warning,) = comparison_warnings(read_study(study(cases=cases, variants=None)))
    assert warning.startswith('b: with data.attention "document" a validation loss is that within documents')
    assert list(comparison_warnings(read_study(study(cases={"b": cases["b"]}, variants=None)))) == []


def test_the_cost_is_that_of_the_runs(study):
    plan = read_study(study())
    costs = arm_costs(plan)
    config = plan.run(plan.arms[3], 1e-3, 1).config
    assert costs["slw.steps"] == cost_of(config, 1, config.timeline().steps)
    row = cost_table(plan, costs).rows[-1]
    assert row[:3] == ["all runs together", "8", "12"]
    tokens = sum(5 * costs[arm.name].tokens for arm in plan.arms)  # two rates on one seed, and three seeds
    assert row[3] == f"{tokens:,}"


@pytest.mark.parametrize("path", shipped_studies().values(), ids=lambda path: path.stem)
def test_shipped_studies_are_planned_without_a_corpus(path, tmp_path):
    result = slw("study", path, "--save", tmp_path / "x", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert all(case["tokens"] > 0 for case in plan["cases"])
    assert not (tmp_path / "x").exists()
    text = slw("study", path, "--save", tmp_path / "x", "--dry-run").stdout
    assert text.startswith(f"{plan['tuning_runs'] + plan['measured_runs']} runs")


def test_a_shipped_study_is_found_by_its_name(tmp_path):
    path = shipped_studies()["studies/mini"]
    plans = [slw("study", name, "--save", tmp_path, "--dry-run", "--json").stdout for name in ("studies/mini", path)]
    assert plans[0] == plans[1] != ""
    result = slw("study", "studies/minni", "--save", tmp_path, "--dry-run")
    assert "studies/minni: is neither a file nor a shipped study; did you mean 'studies/mini'?" in result.stderr


def test_a_copied_study_has_the_same_runs(tmp_path):
    assert slw("configs", "copy", "studies/mini", "--out", tmp_path / "mine.json").returncode == 0
    assert not (tmp_path / "run.schema.json").exists()
    mine, shipped = (read_study(path) for path in (tmp_path / "mine.json", shipped_studies()["studies/mini"]))
    assert [arm.raw for arm in mine.arms] == [arm.raw for arm in shipped.arms]
    assert "studies/mini" in slw("configs", "list").stdout


def test_cases_of_the_mini_study_are_the_shipped_runs():
    plan = read_study(shipped_studies()["studies/mini"])
    for arm in plan.arms:
        shipped = RunConfig.load(shipped_configs()[f"mini/{arm.name}_calm"])
        assert plan.run(arm, 1.5e-3, 1).config.settings() == shipped.settings()
