"""The paper's stability measures by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr

from seqlen_curriculum.analysis.stability import describe_stability, stability
from seqlen_curriculum.run_folder.ratios import ratios_to_best


def training(losses, **columns):
    """Training records of these losses, whose seqlen is 8 times the step."""
    records = [
        {"step": step, "seqlen": 8 * step, "lr": step / 100, "loss": loss} for step, loss in enumerate(losses, 1)
    ]
    for name, values in columns.items():
        for record, value in zip(records, values, strict=True):
            record[name] = value
    return records


def validation(*losses):
    return [
        {"step": 10 * number, "valid_loss": loss, "valid_ppl": math.exp(min(20.0, loss))}
        for number, loss in enumerate(losses, 1)
    ]


def test_ratios_by_hand():
    # minima before: -, 4, 4, 2, 2
    assert ratios_to_best([4, 5, 2, 3, 1])[1:].tolist() == [1.25, 0.5, 1.5, 0.5]
    assert np.isnan(ratios_to_best([4, 5])[0])
    assert ratios_to_best([]).tolist() == []


def test_there_is_no_ratio_to_a_loss_of_zero_nor_beyond_the_numbers():
    assert np.isnan(ratios_to_best([0, 5, 5])).all()
    assert np.isnan(ratios_to_best([1e-300, 1e300])).all()
    summary = stability(training([0, 5, 5]))
    assert (summary["spikes"], summary["max_loss_ratio"], summary["max_loss_ratio_step"]) == ([], None, None)


def test_a_run_by_hand():
    # ratios 5 / 4 = 1.25, 0.5, 2.4 / 2 = 1.2 (no spike: not above), 3 / 2 = 1.5
    summary = stability(training([4, 5, 2, 2.4, 3]), validation(math.log(10), math.log(13), math.log(14), math.log(9)))
    assert summary["steps"] == 5
    assert summary["spikes"] == [
        {"step": 2, "seqlen": 16, "lr": 0.02, "loss": 5, "ratio": 1.25},
        {"step": 5, "seqlen": 40, "lr": 0.05, "loss": 3, "ratio": 1.5},
    ]
    assert (summary["spike_share"], summary["max_loss_ratio"], summary["max_loss_ratio_step"]) == (0.4, 1.5, 5)
    # perplexities 10, 13, 14, 9: 1.3 to rounding, 1.4, 0.9
    assert summary["evaluations"] == 4
    assert summary["fluctuations"][-1]["step"] == 30
    assert summary["max_perplexity_ratio"] == pytest.approx(1.4)
    assert json.loads(json.dumps(summary)) == summary
    message = describe_stability(summary)
    assert "over 1.2 at 2 of 5 steps (40.00%), at most 1.500 at step 5" in message
    assert "at most 1.400" in message


def test_perplexities_above_the_logs_limit_are_distinguished():
    assert stability(training([1, 1]), validation(21.0, 22.0))["max_perplexity_ratio"] == pytest.approx(math.e)


def test_a_single_step_has_no_ratio():
    summary = stability(training([4]))
    assert (summary["max_loss_ratio"], summary["max_loss_ratio_step"], summary["spikes"]) == (None, None, [])
    assert describe_stability(summary) == "loss ratio       needs two steps with losses above 0"


def test_correlations_are_scipys_over_the_steps_that_have_a_variance():
    losses, variance = [4, 5, 2, 2.4, 3, 2.5], [None, 3.0, None, 1.0, 7.0, 2.0]
    summary = stability(training(losses, variance_norm=variance, variance_max=[0.5] * 6))
    expected = pearsonr([1.25, 1.2, 1.5, 1.25], [3, 1, 7, 2])
    found = summary["correlations"]["variance_norm"]
    assert (found["r"], found["p"]) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    assert found["steps"] == 4
    assert "variance_max" not in summary["correlations"]  # it never changes
    for scale in (1e300, 1e-300):  # whose squares overflow and vanish
        scaled = stability(training(losses, variance_norm=[v and scale * v for v in variance]))["correlations"]
        assert scaled["variance_norm"]["r"] == pytest.approx(expected.statistic)
    assert f"{found['r']:.2f} of loss ratio and variance_norm" in describe_stability(summary)


@given(st.lists(st.floats(0.1, 20), min_size=2, max_size=50))
def test_a_loss_that_never_rises_has_no_spike(losses):
    falling = stability(training(sorted(losses, reverse=True)))
    assert falling["spikes"] == []
    assert falling["max_loss_ratio"] <= 1
    ratios = ratios_to_best(losses)
    for step in range(1, len(losses)):
        assert ratios[step] == losses[step] / min(losses[:step])
