"""Each example under the real launcher on two ranks: one launch, of this file, and each test looks at one of them."""

import runpy

import deepspeed
import pytest
from helpers.launching import ROOT
from helpers.parts import Part, do_parts, launch_parts

# 8 + 56 * t / 20 down to a multiple of 8, for t = 1 to 20; full length from then on
RAMP = [8, 8, 16, 16, 16, 24, 24, 24, 32, 32, 32, 40, 40, 40, 48, 48, 48, 56, 56, 64]
HUGGING_FACE = ("llama", "bloom", "bert")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    hugging_face = [Part(name, {"example": "huggingface", "architecture": name}) for name in HUGGING_FACE]
    return launch_parts(
        folder, __file__, [*hugging_face, Part("megatron_style", {"example": "megatron_style"})], ranks=2
    )


def run_example(example, **arguments):
    return runpy.run_path(str(ROOT / "examples" / f"{example}.py"))["main"](**arguments)


def of(history, name):
    return [record[name] for record in history if name in record]


@pytest.mark.parametrize("example", [*HUGGING_FACE, "megatron_style"])
def test_lengths_grow_in_training_and_evaluation_is_full(seen, example):
    # 30,000 tokens in 16 rows and 15,000 in 8 are 1,875 columns a row: 672 in the ramp and 64 * 19 after it
    assert of(seen[example], "seqlen") == RAMP + [64] * 19
    assert of(seen[example], "eval_seqlen") == [64] * 3  # after steps 10, 20 and 30


@pytest.mark.parametrize(("example", "most"), [("llama", 1.5), ("bloom", 1.5), ("bert", 2.8), ("megatron_style", 2.0)])
def test_loss_falls(seen, example, most):
    losses, evaluations = of(seen[example], "loss"), of(seen[example], "eval_loss")
    assert losses[0] > 3.5  # ln 50 = 3.9 and ln 100 = 4.6 at the start
    assert losses[-1] < most
    assert evaluations == sorted(evaluations, reverse=True)
    assert evaluations[-1] < most


@pytest.mark.parametrize("example", ["llama", "bloom"])
def test_a_causal_model_has_a_target_fewer_than_columns(seen, example):
    total, expected = 0, []
    for seqlen in of(seen[example], "seqlen"):
        total += 16 * (seqlen - 1)
        expected.append(total)
    assert of(seen[example], "targets") == expected


def test_a_masked_model_has_the_targets_it_is_asked_for(seen):
    # Rows of 64 - start % 8 tokens, columns 2 and 3 of each 4 asked for; 16 starts hold each padding of 0 to 7 twice.
    def asked(seqlen, padding):
        return sum(column % 4 > 1 for column in range(min(seqlen, 64 - padding)))

    total, expected = 0, []
    for seqlen in of(seen["bert"], "seqlen"):
        total += 2 * sum(asked(seqlen, padding) for padding in range(8))
        expected.append(total)
    assert of(seen["bert"], "targets") == expected


def test_the_model_that_truncates_inside_consumes_rows_times_length(seen):
    history = seen["megatron_style"]
    assert of(history, "consumed_tokens")[19] == 8 * sum(RAMP)
    assert of(history, "consumed_tokens")[-1] == 8 * (sum(RAMP) + 64 * 19)


if __name__ == "__main__":
    deepspeed.init_distributed()
    do_parts(run_example)
    deepspeed.comm.destroy_process_group()
