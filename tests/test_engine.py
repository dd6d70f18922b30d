"""``initialize`` in a user's own loop: one launch on two ranks sees many engines, each test looks at one of them."""

import json

import pytest
import torch
from conftest import launch

from seqlen_curriculum import ConfigError

# The file of DeepSpeed's curriculum learning tutorial, to the letter.
PAPER_JSON = """{
  "train_batch_size": 4096,
  "gradient_accumulation_steps": 1,
  "steps_per_print": 1,
  "optimizer": {
    "type": "Adam",
    "params": {
      "lr": 0.00015,
      "max_grad_norm": 1.0,
      "betas": [0.9, 0.95]
    }
  },
  "gradient_clipping": 1.0,
  "fp16": {
    "enabled": true,
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": false,
    "min_loss_scale": 1
  },
  "curriculum_learning": {
    "enabled": true,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": 1024,
    "schedule_type": "fixed_linear",
    "schedule_config": {
      "total_curriculum_step": 15000,
      "difficulty_step": 8
    }
  }
}
"""
LENGTHS = [4, 8, 8, 12, 12, 16, 16, 16]  # 4 + 12 * t / 6, down to a multiple of 4


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    (folder / "paper.json").write_text(PAPER_JSON)
    out = folder / "seen.json"
    status, output = launch(folder / "log", "tests/launched_engine.py", out, folder / "paper.json", ranks=2)
    assert status == 0, output
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_the_same_run(seen, stage):
    losses, lengths, rates = seen["zero_stages"][f"zero {stage}"]
    reference = seen["zero_stages"]["zero 0"]
    assert lengths == LENGTHS
    assert losses == pytest.approx(reference[0], rel=1e-5)
    assert rates == reference[2]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_balanced_micro_batches_train_the_same_run(seen, stage):
    fixed, balanced = (seen["balanced"][f"{kind} {stage}"] for kind in ("fixed", "balanced"))
    assert balanced["losses"] == pytest.approx(fixed["losses"], rel=1e-5)
    assert fixed["losses"] == pytest.approx(seen["balanced"]["fixed 0"]["losses"], rel=1e-5)
    assert set(fixed["micro_batches"]) == {4}
    assert sorted(set(balanced["micro_batches"])) == [1, 2, 4]  # 4 rows: all at once up to 4 tokens, one by one from 9
    assert fixed["steps"] == balanced["steps"] == 50


def test_bf16_follows_fp32(seen):
    losses, lengths, rates = seen["zero_stages"]["bf16"]
    assert lengths == LENGTHS
    assert losses == pytest.approx(seen["zero_stages"]["zero 0"][0], rel=2e-2)
    assert rates == seen["zero_stages"]["zero 0"][2]


def test_skipped_fp16_steps_count_their_tokens(seen):
    skipped = seen["skipped_steps"]
    assert 0 < skipped["skipped"] < 12
    assert skipped["rates"] == skipped["planned"]
    assert skipped["lengths"][:8] == LENGTHS


def test_zero_3_resumes_exactly_and_saves_the_whole_model(seen):
    from transformers import AutoModelForCausalLM

    checkpoint = seen["zero_3_checkpoint"]
    assert checkpoint["resumed"] == checkpoint["expected"]
    loaded, info = AutoModelForCausalLM.from_pretrained(checkpoint["folder"], output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.transformer.wte.weight.shape == (128, 16)


def test_the_papers_own_file_trains_here_and_is_refused_by_deepspeed(seen):
    paper = seen["paper_json"]
    assert paper["refusal"].startswith("DeepSpeedConfigError")
    assert "curriculum_learning" in paper["refusal"]
    assert paper["lengths"] == [8, 8]
    assert all(4 < loss < 6 for loss in paper["losses"])  # ln 128 = 4.85 at the start
    assert paper["clipping"] == 1.0


def test_deepspeeds_own_scheduler_agrees_at_every_step(seen):
    assert seen["deepspeed_scheduler"] == []


def test_an_optimizer_of_the_users_own_gives_the_rate(seen):
    own = seen["own_optimizer"]
    assert own["rates"] == own["planned"]
    assert own["train_batch_size"] == 4
    assert own["refusal"].startswith("DeepSpeed refuses its part of the configuration")


@pytest.mark.parametrize("kind", ["zero 0", "zero 1", "zero 2 fp16", "zero 3"])
def test_a_preflight_leaves_no_trace(seen, kind):
    assert seen["preflight_traces"][f"{kind}, True"] == seen["preflight_traces"][f"{kind}, False"]


def test_a_preflight_tells_all_ranks_who_is_out_of_memory(seen):
    first, second = seen["out_of_memory"]
    wanted = (
        "a micro-batch of 600 rows of 512 tokens, the largest of this run, does not fit the memory of rank 1; lower it"
    )
    assert first.startswith(f"train_micro_batch_size_per_gpu: {wanted}")
    assert second.startswith(f"train_micro_batch_size_per_gpu: {wanted}")
    assert "can't allocate memory" in second  # the device's own words, where it happened


def test_a_pipeline_of_the_users_own_follows_the_lengths(seen):
    own = seen["own_pipeline"]
    assert own["train_batch_size"] == 2  # 1 row x 2 micro-batches: two ranks have one model between them
    assert own["lengths"] == [length for length in LENGTHS for _ in range(2)]
    assert own["losses"][-1] < own["losses"][0]


def test_misuse_is_told_before_deepspeed_starts():
    from seqlen_curriculum import initialize

    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    with pytest.raises(ConfigError, match="neither a path, a dict nor a RunConfig"):
        initialize(config=3)
    with pytest.raises(ConfigError, match=r"config\.json: can't be read"):
        initialize(config="config.json")
    with pytest.raises(ConfigError, match="given more than once"):
        initialize(config=config, config_params=config)
    with pytest.raises(ConfigError, match=r"batch_size_warmup: DeepSpeed's engine doesn't follow it"):
        initialize(config={**config, "batch_size_warmup": {"start": 2, "increment": 2, "tokens": 100}})
    ours = {"scheduler": {"type": "TokenCosineLR"}, "curriculum_learning": {"enabled": False, "max_difficulty": 8}}
    with pytest.raises(ConfigError, match="lr_scheduler= is given too"):
        initialize(None, None, lr_scheduler=object(), config={**config, **ours, "training": {"train_tokens": 1e4}})


class Truncating(torch.nn.Linear):
    def forward(self, tokens, curriculum_seqlen=None):
        return super().forward(tokens[:, :curriculum_seqlen])


@pytest.mark.parametrize("keyword", ["curriculum_seqlen", "seqlen", "input"])
def test_a_model_that_takes_no_length_is_told_before_deepspeed_starts(keyword):
    from seqlen_curriculum import initialize

    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    block = {"enabled": False, "max_difficulty": 8}
    model = torch.nn.Embedding(4, 4) if keyword == "curriculum_seqlen" else Truncating(4, 4)
    refusal = (
        rf"curriculum_kwarg: the forward of {type(model).__name__} takes no keyword '{keyword}'; add it to forward's"
    )
    with pytest.raises(ConfigError, match=refusal):
        initialize(model=model, config={**config, "curriculum_learning": block}, curriculum_kwarg=keyword)


def test_a_length_that_no_section_gives_is_told_before_deepspeed_starts():
    from seqlen_curriculum import initialize

    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    with pytest.raises(
        ConfigError, match="'curriculum_seqlen' asks for the step's length, but no section gives it; add"
    ):
        initialize(model=Truncating(4, 4), config=config, curriculum_kwarg="curriculum_seqlen")


@pytest.mark.parametrize("sharding", ["zero 0", "zero 1", "zero 2", "zero 3", "offload"])
def test_adams_moments_are_those_of_an_unsharded_run(seen, sharding):
    before, *measured = seen["moments"][sharding]
    assert before == {}
    for ours, theirs in zip(measured, seen["moments"]["torch"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(measured) == 3
    assert seen["moments"]["sgd"] == seen["moments"]["fp16"] == {}  # none there, and none true at stage 0
