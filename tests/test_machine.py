"""What the report says of the use of the machine, by hand."""

import pytest
from helpers.synthetic_runs import BASE, synthetic

from seqlen_curriculum.analysis.machine import machine_use
from seqlen_curriculum.analysis.page import page
from seqlen_curriculum.analysis.report import report
from seqlen_curriculum.analysis.run import Run, summarise
from seqlen_curriculum.analysis.tables import ReportTables


def measured():
    """Four steps of 36 s and two evaluations of 9 s, 162 s; 8 s for a checkpoint before step 3."""
    run = synthetic("measured", [4.0, 3.0, 3.9, 2.0], {2: 2.5, 4: 2.0})
    first, second, third, last = run.steps
    first |= {"mfu": 0.2, "seconds": 36.0, "peak_memory_bytes": 3 * 2**30, "data_seconds": 1.0}
    second |= {"mfu": None, "peak_memory_bytes": 5 * 2**30, "data_seconds": 3.25}
    third |= {"checkpoint_seconds": 8.0}
    last |= {"mfu": 0.4, "seconds": 12.0, "data_seconds": 0.0}
    return run


def test_use_of_the_machine_by_hand():
    # 36 s at 0.2 and 12 s at 0.4: (7.2 + 4.8) / 48. The time is 36 + 36 + 36 + 12 + 9 + 9 + 8 = 146 s.
    assert machine_use(measured().records) == {
        "mfu": pytest.approx(0.25),
        "peak_memory_bytes": 5 * 2**30,
        "data_share": pytest.approx(4.25 / 146),
        "checkpoint_share": pytest.approx(8 / 146),
    }


def test_the_table_has_the_runs_that_were_measured():
    runs = [BASE, measured()]
    numbers = report(runs)
    (row,) = ReportTables(numbers).machine().rows
    assert [str(cell) for cell in row] == ["measured", "25.00%", "5.0 GiB", "2.91%", "5.48%"]
    assert numbers["runs"][0]["machine"] == dict.fromkeys(numbers["runs"][1]["machine"])
    text = page(numbers, runs)
    assert 'data-key="runs/1/machine/mfu"' in text
    assert 'data-key="runs/0/machine' not in text


def test_a_terminal_shows_what_is_known():
    assert "machine          MFU 25.00%, peak memory 5.0 GiB, waiting for data 2.91%, saving" in summarise(measured())
    assert "machine" not in summarise(BASE)
    memory_only = Run("run", [{**record, "peak_memory_bytes": 2**30, "mfu": None} for record in BASE.records])
    assert "machine          peak memory 1.0 GiB\n" in summarise(memory_only)
