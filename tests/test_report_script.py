"""The interactive plots of a report: the data in the page by value, and the script in a real browser with a real mouse."""

import base64
import copy
import json
import math
import random
import zlib

import pytest
from helpers.browser import Chromium
from helpers.synthetic_runs import synthetic

from seqlen_curriculum.analysis.page import page
from seqlen_curriculum.analysis.plot_data import packed, plot_data
from seqlen_curriculum.analysis.plots import PLOTS
from seqlen_curriculum.analysis.report import report
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.analysis.write_report import write_report


def noisy(name, steps, seed, spikes=()):
    """A run of falling losses with noise, spikes at ``spikes`` and an evaluation every tenth step."""
    draw = random.Random(seed)
    losses = [2 + 8 * math.exp(-step / (steps / 9)) + draw.random() / 10 for step in range(1, steps + 1)]
    for step in spikes:
        losses[step - 1] = 20.0 + step / steps
    valid = {step: losses[step - 1] for step in range(10, steps + 1, 10) if step not in spikes}
    run = synthetic(name, losses, valid)
    for record in run.steps[::20]:
        record |= {key: draw.random() for key in ("variance_norm", "variance_max", "momentum_norm", "momentum_max")}
    return run


def column(entry):
    """The numbers of a compressed column."""
    total, numbers = 0, []
    for difference in entry["differences"]:
        total += difference
        numbers.append(total / 10 ** entry["places"])
    return numbers


def test_the_data_are_the_logs_to_five_digits_with_all_extremes():
    runs = [noisy("a", 30_000, 1, spikes=(777, 29_001)), noisy("b", 50, 2)]
    data = plot_data(runs)
    assert json.loads(zlib.decompress(base64.b64decode(packed(data)))) == data
    for run, described in zip(runs, data["runs"], strict=True):
        for key, columns in described["series"].items():
            logged = dict(zip(run.series(key).step.tolist(), run.series(key).values.tolist(), strict=True))
            x = columns.get("step")
            if x is None:
                continue
            shown = dict(zip(column(x), columns["y"], strict=True))
            assert all(value == float(f"{logged[step]:.5g}") for step, value in shown.items()), key
            for extreme in (min, max):
                assert extreme(shown.values()) == float(f"{extreme(logged.values()):.5g}"), key
    losses = data["runs"][0]["series"]["loss"]
    assert len(losses["y"]) <= 2002
    assert {777, 29_001} <= set(column(losses["step"]))  # both spikes, each of a single step
    assert column(losses["tokens"])[-1] == 3_000_000
    seqlen = data["runs"][0]["series"]["seqlen"]
    assert (column(seqlen["step"]), seqlen["y"]) == ([1, 30_000], [8, 8])  # it never changes


@pytest.mark.parametrize("steps", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_24_long_runs_make_a_page_of_less_than_a_megabyte(steps):
    three = [noisy(f"runs/seqlen-warmup-{n}", steps, n, spikes=range(500 + n, steps, steps // 20)) for n in range(3)]
    for run in three:
        run.stability  # noqa: B018  computed once for all twins
        for plot in PLOTS:
            plot.runs([run])
    runs = []
    for number in range(24):  # 3 x 20 KB of data lie between two twins, too far for zlib to find the likeness
        twin = copy.copy(three[number % 3])
        vars(twin)["name"] = f"runs/seqlen-warmup-{number}"
        runs.append(twin)
    assert 500_000 < len(page(report(runs), runs).encode()) < 1_000_000


RUNS = [noisy("first", 300, 1, spikes=(150,)), noisy("second", 200, 2)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(RUNS, folder)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    tab = Chromium(tmp_path_factory.mktemp("chromium"))
    yield tab
    tab.close()


@pytest.fixture
def tab(chromium, written):
    chromium.open(written, "window.report")
    chromium.value("sessionStorage.clear()")
    chromium.open(written, "window.report && report.plots.every(one => one.axes)")
    chromium.events.clear()
    yield chromium
    assert chromium.problems() == []


def axis(tab, name, side):
    """(low, high) of an axis."""
    return tuple(tab.value(f"(a => [a.low, a.high])(report.plots.find(p => p.spec.name === '{name}').axes.{side})"))


def corner(tab, name):
    """The place of a plot in the window, scrolled to."""
    tab.value(f"document.getElementById('plot-{name}').scrollIntoView({{block: 'center'}})")
    return tab.value(
        f"(r => [r.left, r.top, r.width, r.height])(document.getElementById('plot-{name}').getBoundingClientRect())"
    )


def shown(tab):
    """The rows of the values at the cursor: {run: texts}."""
    rows = tab.value(
        "[...document.querySelectorAll('.tip tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return {name: texts for name, *texts in rows[1:]}


def hover(tab, name, share):
    """Move the mouse to a share of the x axis; return the x there and the values shown."""
    left, top, _, height = corner(tab, name)
    start, length = tab.value(f"(a => [a.start, a.length])(report.plots.find(p => p.spec.name === '{name}').axes.x)")
    at = left + start + share * length
    tab.mouse("mouseMoved", at - 3, top + height / 2)
    tab.mouse("mouseMoved", at, top + height / 2)
    tab.frame()
    low, high = axis(tab, name, "x")
    return low + share * (high - low), shown(tab)


def number(text):
    return float(text.replace(",", ""))


@pytest.mark.needs("browser")
@pytest.mark.parametrize(("name", "key"), [("loss_step", "loss"), ("perplexity_step", "valid_ppl"), ("lr", "lr")])
def test_the_values_at_the_cursor_are_those_of_the_log(tab, name, key):
    for share in (0.1, 0.33, 0.5, 0.62):
        x, rows = hover(tab, name, share)
        assert set(rows) == {"first", "second"}
        for run in RUNS:
            logged = dict(zip(run.series(key).step.tolist(), run.series(key).values.tolist(), strict=True))
            value, step = map(number, rows[run.name])
            assert abs(step - x) == min(abs(other - x) for other in logged), share
            assert value == float(f"{logged[step]:.5g}")
    assert set(hover(tab, name, 0.9)[1]) == {"first"}  # the second has ended at step 200 of 300


@pytest.mark.needs("browser")
def test_the_last_perplexity_shown_is_the_reports_and_cursors_are_linked(tab, written):
    final = json.loads((written.parent / "report.json").read_text())["runs"][0]["final"]
    _, rows = hover(tab, "perplexity_tokens", 0.98)
    assert list(map(number, rows["first"])) == [float(f"{final['valid_ppl']:.5g}"), final["consumed_tokens"]]
    pixels = "p.overlay.getImageData(0, 0, p.width, p.height).data"
    drawn = f"report.plots.filter(p => {pixels}.some(v => v)).map(p => p.spec.name)"
    assert tab.value(drawn) == ["perplexity_tokens", "loss_tokens"]


@pytest.mark.needs("browser")
def test_a_dragged_box_zooms_and_a_double_click_resets(tab, written):
    left, top, _, _ = corner(tab, "loss_step")
    before = axis(tab, "loss_step", "x"), axis(tab, "loss_step", "y")
    ends = "(p => [100, 200].map(x => p.value('x', x)).concat([120, 60].map(y => p.value('y', y))))"
    wanted = tab.value(f"{ends}(report.plots.find(p => p.spec.name === 'loss_step'))")

    def drag(*places):
        for kind, (x, y) in zip(("mousePressed", "mouseMoved", "mouseReleased"), places, strict=True):
            tab.mouse(kind, left + x, top + y, clicks=1)
        tab.frame()

    drag((100, 120), (200, 60), (200, 60))
    zoomed = axis(tab, "loss_step", "x") + axis(tab, "loss_step", "y")
    assert zoomed == pytest.approx(wanted, rel=1e-2)
    tab.open(written, "window.report && report.plots.every(one => one.axes)")
    assert axis(tab, "loss_step", "x") + axis(tab, "loss_step", "y") == zoomed  # over a reload
    left, top, _, _ = corner(tab, "loss_step")
    for clicks in (1, 2):
        tab.mouse("mousePressed", left + 150, top + 90, clicks)
        tab.mouse("mouseReleased", left + 150, top + 90, clicks)
    tab.frame()
    assert (axis(tab, "loss_step", "x"), axis(tab, "loss_step", "y")) == before


def press(tab, selector):
    tab.value(f"document.querySelector({json.dumps(selector)}).click()")
    tab.frame()


@pytest.mark.needs("browser")
def test_axes_become_logarithmic_and_runs_are_switched_off(tab):
    figure = "figure:has(#plot-loss_step)"
    low, high = axis(tab, "loss_step", "x")
    press(tab, f"{figure} .tools button:nth-of-type(2)")
    log_low, log_high = axis(tab, "loss_step", "x")
    assert (low < 0 < log_low < 1, log_high > 300, high > 300) == (True, True, True)
    decades = "(p => [1, 10, 100].map(x => p.pixel('x', x)))"
    one, ten, hundred = tab.value(f"{decades}(report.plots.find(p => p.spec.name === 'loss_step'))")
    assert ten - one == pytest.approx(hundred - ten)
    highest = axis(tab, "loss_step", "y")[1]
    press(tab, ".legend li:first-child button")
    assert axis(tab, "loss_step", "y")[1] < highest - 5  # the spike of 20.5 is gone
    assert set(hover(tab, "loss_tokens", 0.4)[1]) == {"second"}


@pytest.mark.needs("browser")
def test_smoothing_is_tensorboards(tab):
    tab.value(
        "(s => { s.value = 0.8; s.dispatchEvent(new Event('input')) })(document.querySelector('.controls input'))"
    )
    tab.frame()
    _, rows = hover(tab, "loss_step", 0.3)
    smooth, value, step = map(number, rows["second"])
    mean = 0.0
    losses = RUNS[1].series("loss").values[: int(step)].tolist()
    for loss in losses:
        mean = 0.8 * mean + 0.2 * loss
    assert smooth == float(f"{mean / (1 - 0.8 ** len(losses)):.5g}")
    assert value == float(f"{losses[-1]:.5g}")


@pytest.mark.needs("browser")
def test_a_tap_shows_values_on_a_phone(tab, written):
    tab.open(written, "window.report && report.plots.every(one => one.axes)", width=390, touch=True)
    left, top, width, height = corner(tab, "loss_step")
    tab.call(
        "Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": left + width / 2, "y": top + height / 2}]
    )
    tab.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    tab.frame()
    assert set(shown(tab)) == {"first", "second"}
    assert tab.value("document.querySelector('.tip').getBoundingClientRect().width") == 390


@pytest.mark.needs("browser")
def test_without_script_the_static_plots_and_all_tables_are_there(chromium, written):
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    chromium.open(written, "document.readyState === 'complete'")
    plots = chromium.value("[...document.querySelectorAll('svg.plot')].map(one => one.getBoundingClientRect().height)")
    chromium.call("Emulation.setScriptExecutionDisabled", value=False)
    assert len(plots) == sum(bool(plot.runs(RUNS)) for plot in PLOTS)
    assert min(plots) > 150
    assert chromium.value("document.querySelector('.controls').offsetHeight") == 0
    assert chromium.value("document.querySelectorAll('canvas').length") == 0


def test_a_run_of_one_step_has_data():
    data = plot_data([Run("one", synthetic("one", [4.0], {}).records)])
    assert data["runs"][0]["series"]["loss"]["y"] == [4.0]
