"""The page of a report: synthetic runs in words and figures, two real ones in a real browser."""

import html
import json
import math
import re
import signal
import sys

import pytest
from helpers import browser
from helpers.command import slw
from helpers.launching import ROOT, limit, running, wait_until
from helpers.runs import Runs
from helpers.runs import run as run_of
from helpers.synthetic_runs import BASE, synthetic

from seqlen_curriculum import CheckpointError, ConfigError, DataError, RunConfig
from seqlen_curriculum.analysis.curves import COLOURS, Curves, style_of
from seqlen_curriculum.analysis.drawing import _compact, draw_run, save_png, svg
from seqlen_curriculum.analysis.page import page
from seqlen_curriculum.analysis.plots import PLOTS
from seqlen_curriculum.analysis.read_run import load_run
from seqlen_curriculum.analysis.report import report
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.analysis.write_report import check_folder, follow, write_report
from seqlen_curriculum.run_folder.run_log import RunLog

REPORT = [sys.executable, str(ROOT / "scripts" / "report.py")]


def written(folder, run):
    """The log of ``run`` in ``folder``."""
    folder.mkdir(exist_ok=True)
    log = RunLog(folder / "runlog.jsonl")
    for record in run.records:
        log.write(record)
    log.close()
    return folder


def unstable(name):
    """A run of 30 spikes, with Adam's state at every second step, and a rollback."""
    losses = [4.0] + [5.0 + step / 100 for step in range(30)] + [3.0]
    run = synthetic(name, losses, {31: 3.1, 32: 3.0})
    for record in run.steps[::2]:
        record |= {f"{state}_norm": record["loss"] ** 2 for state in ("variance", "momentum")}
        record |= {f"{state}_max": 0.1 * record["loss"] for state in ("variance", "momentum")}
    skipped = {"step": 33, "seqlen": 8, "rows": 4, "consumed_tokens": 3_300, "skipped": True}
    rollback = {"step": 33, "loss": None, "ratio": 2.0, "returned_to": 30, "skipped": [33, 33]}
    return Run(name, [*run.records, skipped], rollbacks=[rollback])


def test_variance_rollbacks_and_many_spikes_have_their_places():
    run = unstable("<b>&run</b>")
    found = report([run, BASE])
    ours = found["runs"][0]
    # all of 5.00 to 5.29 are over 1.2 times 4; the largest ten are the last ones
    assert (ours["stability"]["spikes"], ours["skipped_steps"]) == (30, 1)
    assert [spike["step"] for spike in ours["stability"]["spikes_listed"]] == [*range(2, 12), *range(22, 32)]
    assert ours["stability"]["correlations"]["variance_max"]["steps"] == 15
    assert ours["stability"]["correlations"]["variance_max"]["r"] > 0.9
    text = page(found, [run, BASE])
    assert "the first 10 and the 10 largest others of 30" in text
    assert "Not logged by base." in text
    assert "Not plotted, because no run logs them: Adam's variance: norm" in html.unescape(page(report([BASE]), [BASE]))
    assert "Dotted lines are rollbacks." in text
    assert {f"plot-{name}" for name in ("variance_norm", "variance_max", "ratio_variance_norm")} <= set(
        re.findall(r'svg id="([^"]+)"', text)
    )
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;run&lt;/b&gt;" in text


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_curves_stand_out_from_light_and_dark_pages():
    style = (ROOT / "seqlen_curriculum" / "analysis" / "templates" / "report.css").read_text()
    light, dark = map(luminance, re.findall(r"--page: (#\w{6})", style))
    for colour in map(luminance, COLOURS):
        assert (light + 0.05) / (colour + 0.05) >= 3
        assert (colour + 0.05) / (dark + 0.05) >= 3
    assert len({style_of(number) for number in range(18)}) == 18


@pytest.mark.parametrize(
    "run",
    [
        synthetic("one step", [4.0], {}),
        synthetic("no evaluation", [4.0, 3.0], {}),
        Run("later", BASE.records[-2:]),
        synthetic("flat", [4.0, 4.0, 4.0], {3: 30.0}, seconds=0.0),
    ],
    ids=lambda run: run.name,
)
def test_sparse_logs_make_sensible_pages(run, tmp_path):
    pages = []
    for runs in ([run], [run, BASE], [BASE, run]):
        found = report(runs)
        pages.append(page(found, runs))
        assert pages[-1].count("<svg") == sum(bool(plot.runs(runs)) for plot in PLOTS)
        assert json.dumps(found, allow_nan=False)
    notes = pages[0]
    assert ("has no evaluation" in notes) == (not run.evaluations)
    assert ("starts at step 4" in notes) == (run.name == "later")


@pytest.mark.parametrize("name", ["_hidden", "a $x^{ $name", "long " * 40])
def test_a_run_of_any_name_has_its_place_in_the_legend(tmp_path, name):
    from matplotlib.image import imread

    run = synthetic(name, [4.0, 3.0], {2: 3.0})
    for draw in (lambda path: save_png(PLOTS[0], [run], path, "us"), lambda path: draw_run([run], path)):
        draw(tmp_path / "run.png")
        picture = imread(tmp_path / "run.png")[..., :3]
        height, width, _ = picture.shape
        legend = picture[: height // 12]
        assert (legend < 0.5).all(axis=2).sum() > 100  # letters
        assert (legend[:, : width // 100] == 1).all()  # none of them cut off
    assert "<svg" in svg(PLOTS[0], [run])


def test_rows_are_drawn_only_where_they_change():
    rising = Run("rising", [{**record, "rows": record["step"]} for record in BASE.records])
    (rows,) = (plot for plot in PLOTS if plot.name == "rows")
    assert (rows.runs([BASE]), rows.runs([BASE, rising])) == ([], [BASE, rising])


def test_the_perplexity_plot_shows_the_first_descent():
    import matplotlib.figure

    (plot,) = (plot for plot in PLOTS if plot.name == "perplexity_step")
    falling = synthetic("falling", [4.0] * 3, {1: math.log(9000), 2: math.log(30), 3: math.log(10)})
    axis = matplotlib.figure.Figure().subplots()
    Curves([falling]).draw(axis, plot)
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "log"
    assert low < 10 < 9000 < high


def test_lines_of_an_svg_keep_their_points():
    points = "M 10.53 0.5 \nL 10.0 20.46 \nL 30.04 20.46 \nL 20.04 20.0 \nL 20.1 0.0"
    assert _compact(points) == "M10.5 .5l-.5 19.9 20 0-10-.4 .1-20".replace("M10.5 .5", "M10.5 0.5")
    assert _compact("M 0 0 \nL 0 3.52") == "M 0 0 L 0 3.5"


def test_nothing_of_others_is_written_over(tmp_path):
    write_report([BASE], tmp_path)
    check_folder(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.html", "report.json"} | {f"{plot.name}.png" for plot in PLOTS if plot.runs([BASE])}
    for name in ("report.html", "report.json", "loss_step.png"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"my own")
        with pytest.raises(ConfigError, match=f"--out .*{name}"):
            check_folder(tmp_path)
        (tmp_path / name).write_bytes(before)


def test_following_rewrites_when_a_log_has_changed_and_ends_at_the_budget(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    written(run, Run("none", []))
    following = follow({"run": run}, out, 0.5)
    next(following)
    assert list(out.iterdir()) == []  # no step yet
    written(run, Run("first", BASE.records[:2]))
    next(following)
    text = (out / "report.html").read_text()
    assert '<meta http-equiv="refresh" content="1">' in text
    assert re.search(r"every 0\.5 seconds", text)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    (out / "report.html").unlink()
    next(following)
    assert not (out / "report.html").exists()  # nothing changed
    (run / "run.json").write_text(json.dumps({"config": {"training": {"train_tokens": 400}}, "launches": []}))
    next(following)
    assert "run is at step 2 and has consumed 50% of 400 tokens." in (out / "report.html").read_text()
    written(run, Run("rest", BASE.records[2:]))
    assert list(following) == []
    with pytest.raises(DataError, match="there is no such folder"):
        next(follow({"run": tmp_path / "nowhere"}, out, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nothing"], "there is no such folder; give the --save folder of a run"),
        (["{run}"], "no training step here yet"),
        (["{run}", "{run}/."], "is given twice; name each once"),
        (["{run}", "--watch", "5"], "--watch: give seconds above 0 and below 1e6, with --out FOLDER"),
        (["{run}", "--watch", "0", "--out", "{run}"], "--watch: give seconds above 0"),
        (["{run}", "--out", "/dev/null/report"], "can't be written to"),
        (["{run}", "--png", "curves.html"], "not the name of an image file"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, arguments, message):
    result = slw("report", *(argument.format(run=tmp_path) for argument in arguments))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert message in result.stderr


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_run_json_is_named(tmp_path, text):
    written(tmp_path, BASE)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json: .*move it away to continue without it"):
        load_run(tmp_path)


@pytest.fixture(scope="session")
def tiny_run(tiny_run):
    """The tiny run in half as many micro-batches, which are faster: one or two per step on one rank."""
    return {**tiny_run, "train_micro_batch_size_per_gpu": 4}


@pytest.fixture(scope="module")
def real(tmp_path_factory, tiny_run):
    """The folder of two runs, and of one that continued the second from a checkpoint."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "run.json").write_text(json.dumps(tiny_run))

    config = folder / "run.json"
    constant = run_of(config, folder / "constant", ["curriculum_learning.enabled=false"])
    resumed = run_of(config, folder / "resumed", resume=folder / "warmup" / "global_step42", after="warmup")
    runs = Runs(folder)
    runs.launch("three", [constant, run_of(config, folder / "warmup"), resumed], ranks=2)
    return runs


@pytest.fixture(scope="module")
def out(real):
    """The report of the two, from the command line."""
    result = slw("report", real["constant"], real["warmup"], "--out", real.folder / "out")
    assert result.returncode == 0, result.stderr
    assert f"report           {real.folder / 'out' / 'report.html'}" in result.stdout
    assert re.search(r"constant's best validation perplexity of \d", result.stdout)
    return real.folder / "out"


def test_a_run_records_what_it_was_trained_with(real, tiny_run):
    info = load_run(real["warmup"]).info
    config = RunConfig.from_dict(info["config"])
    assert config.settings() == RunConfig.from_dict(tiny_run).for_ranks(2).settings()
    assert config.training == RunConfig.from_dict(tiny_run).training
    (one,) = info["launches"]
    assert (one["ranks"], one["first_step"]) == (2, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", one["started"])
    assert {"python", "torch", "deepspeed", "transformers", "numpy"} <= set(one["versions"])
    assert (one["device"]["cores"] >= 1, one["device"]["memory_bytes"] > 2**28) == (True, True)
    assert set(one["device"]) >= {"accelerator", "cpu"}
    assert load_run(real["resumed"]).info["launches"][0]["first_step"] == 43
    assert load_run(real["constant"]).info["config"]["curriculum_learning"] == {"enabled": False}
    assert not list(real.folder.glob("*/*.tmp"))


def test_a_launch_more_is_added_and_damage_does_not_stop_it(tmp_path):
    from seqlen_curriculum.training.run_info import record_launch

    record_launch(tmp_path, {"lr": 1}, ranks=2, first_step=1)
    record_launch(tmp_path, {"lr": 1, "zero": 3}, ranks=4, first_step=7)
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["config"] == {"lr": 1, "zero": 3}
    assert [(one["ranks"], one["first_step"]) for one in info["launches"]] == [(2, 1), (4, 7)]
    text = page(report([Run("run", BASE.records, info)]), [Run("run", BASE.records, info)])
    assert "<span>Launches</span>" in text
    (tmp_path / "run.json").write_text("{")
    record_launch(tmp_path, {}, ranks=1, first_step=9)
    assert [one["first_step"] for one in json.loads((tmp_path / "run.json").read_text())["launches"]] == [9]
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    with pytest.raises(CheckpointError, match=r"run\.json: can't be written"):
        record_launch(tmp_path, {}, ranks=1, first_step=9)


def test_the_report_is_printed_as_it_is_written(real, out):
    printed = slw("report", real["constant"], real["warmup"], "--json").stdout
    assert json.loads(printed) == json.loads((out / "report.json").read_text())
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("perplexity_hours", "seqlen"))


def test_the_page_needs_no_network(out):
    text = (out / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)|https?:|@import|<link|fetch\(|import\(', text) == []
    assert "http-equiv" not in text


def at(found, path):
    for key in path.split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def assert_readable(seen, width, found, runs):
    """What was measured of a page: its numbers are the report's, nothing overlaps, overflows, is cut or hard to read."""
    assert seen["scroll_width"] <= width
    for path, value, _ in seen["data"]:
        assert json.loads(value) == at(found, path), path
    assert seen["outcome"] == " ".join(found["outcome"])
    assert [name for name, _ in seen["plots"]] == [f"plot-{plot.name}" for plot in PLOTS if plot.runs(runs)]
    for _, (left, top, right, bottom) in seen["plots"]:
        assert 0 <= left < right <= width
        assert right - left > 300
        assert bottom - top > 150
    assert overlapping(seen["figures"]) == []
    assert seen["clipped"] == []
    assert seen["unnamed"] == 0
    assert seen["texts"] > 100
    assert seen["least_contrast"] >= 4.5
    assert len(set(seen["ids"])) == len(seen["ids"])


@pytest.mark.needs("browser")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(out, tmp_path, dark):
    found = json.loads((out / "report.json").read_text())
    runs = [load_run(out.parent / name) for name in ("constant", "warmup")]
    by_width = browser.measured(out / "report.html", tmp_path, dark, script=dark)  # light: the static plots
    assert set(by_width) == set(browser.WIDTHS)
    for width, seen in by_width.items():
        assert seen["dark"] == dark
        assert_readable(seen, width, found, runs)
    shown = {path: text for path, _, text in by_width[390]["data"]}
    assert shown["runs/0/reached_ratio/hours"] == "1.0x"
    assert shown["runs/1/end/step"] == f"{found['runs'][1]['end']['step']:,}"
    assert shown["runs/0/best/valid_ppl"] == f"{found['runs'][0]['best']['valid_ppl']:.4g}"
    assert {"runs/0/stability/spike_share", "runs/1/launches/0/versions/torch", "config/differing/0/values/1"} <= set(
        shown
    )


@pytest.mark.needs("browser")
def test_long_names_and_all_the_plots_in_a_browser(tmp_path):
    run = unstable("runs/<i>" + "a-very-long-name-of-a-run" * 5)
    run = Run(run.name, run.records, {"config": {"model": {"preset": "gpt2-117m"}}}, run.rollbacks)
    runs = [run, Run("base", BASE.records, {"config": {"lr": [1, 2]}})]
    found = report(runs)
    (tmp_path / "report.html").write_text(page(found, runs))
    for width, seen in browser.measured(tmp_path / "report.html", tmp_path, dark=True).items():
        assert_readable(seen, width, found, runs)
        assert len(seen["plots"]) == len(PLOTS) - 1  # no rows
        shown = {path: text for path, _, text in seen["data"]}
        assert shown["runs/0/rollbacks/0/returned_to"] == "30"
        assert shown["runs/0/stability/spikes_listed/0/ratio"] == "1.250"
        assert shown["config/differing/1/values/1"] == "[1, 2]"
        assert float(shown["runs/0/stability/correlations/variance_max/r"]) > 0.9


def overlapping(boxes):
    """Pairs of (left, top, right, bottom) that share an area."""
    pairs = [(one, other) for number, one in enumerate(boxes) for other in boxes[number + 1 :]]
    return [
        (one, other)
        for one, other in pairs
        if min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])
    ]


def test_watching_ends_with_ctrl_c_and_a_page_that_stays(tmp_path):
    written(tmp_path / "run", BASE)
    out, log = tmp_path / "out", tmp_path / "log"
    with running([*REPORT, str(tmp_path / "run"), "--out", str(out), "--watch", "0.2"], log) as process:
        wait_until((out / "report.html").exists, "no report is written")
        assert 'http-equiv="refresh"' in (out / "report.html").read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=limit(60)) == 0, log.read_text()
    assert 'http-equiv="refresh"' not in (out / "report.html").read_text()
    assert (out / "loss_step.png").exists()
