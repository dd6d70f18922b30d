"""What the other tests rest on: capabilities, locks of killed compilations, commands killed with all they started."""

import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from helpers import capabilities
from helpers.forked_command import forked_command
from helpers.launchers import srun, without_launcher
from helpers.launching import TESTS, forked, launch, limit, running, wait_until
from helpers.order import LONG, longest_first


def test_an_unknown_capability_is_named_with_the_valid_ones(monkeypatch):
    monkeypatch.setenv(capabilities.WITHOUT, "fp16, browsr")
    with pytest.raises(ValueError, match="browsr; valid are fp16, bf16, gpu, compiler, browser, npm"):
        capabilities.disabled()


def test_what_is_disabled_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setenv(capabilities.WITHOUT, "bf16")
    monkeypatch.setenv(capabilities.ANSWERS, '{"fp16": "", "npm": "no npm"}')
    assert capabilities.lacking(("fp16",)) == ""
    assert capabilities.lacking(("fp16", "npm")) == "needs npm: no npm"
    assert capabilities.lacking(("bf16",)) == "needs bf16: disabled by SEQLEN_TEST_WITHOUT"


def test_hidden_commands_are_found_by_no_process(tmp_path, monkeypatch):
    for name in ("c++", "x86_64-linux-gnu-g++-12", "npm", "other"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    before = dict(os.environ)
    with capabilities.hidden_commands({"compiler", "fp16"}):
        assert [shutil.which(name) for name in ("c++", "g++", "x86_64-linux-gnu-g++-12")] == [None] * 3
        assert shutil.which("npm")
        assert subprocess.run(["other"]).returncode == 0
        assert os.environ["TORCH_EXTENSIONS_DIR"] != before["TORCH_EXTENSIONS_DIR"]
    assert dict(os.environ) == before


def test_a_command_is_killed_with_all_that_it_started(tmp_path):
    child = "subprocess.Popen(['sleep', '99'], process_group=0)"
    code = f"import subprocess, time; print({child}.pid, flush=True); time.sleep(99)"
    log = tmp_path / "log"
    with running([sys.executable, "-c", code], log) as process:
        wait_until(lambda: log.read_text().endswith("\n"), "it does not start")
    assert process.returncode is not None
    pid = int(log.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_longest_files_are_first_and_exist():
    assert [name for name in LONG if not (TESTS / f"test_{name}.py").exists()] == []
    names = ["test_batch.py", "test_spikes.py", "test_matrix.py", "test_a.py"]
    items = [SimpleNamespace(path=TESTS / name, number=number) for name in names for number in (1, 2)]
    ordered = [(item.path.name, item.number) for item in longest_first(items)]
    expected = ["test_matrix.py", "test_spikes.py", "test_batch.py", "test_a.py"]
    assert ordered == [(name, number) for name in expected for number in (1, 2)]


RANK_ENDS = """
import os, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], *sys.argv[1:], __name__, flush=True)
if os.environ["RANK"] == "1":
    sys.exit(7)
time.sleep(99)
"""


def test_a_forked_launch_is_that_of_a_launcher(tmp_path):
    """The ranks have torch already and what a launcher gives them; when one of them fails the others are killed."""
    (tmp_path / "script.py").write_text(f"import sys; assert 'torch' in sys.modules{RANK_ENDS}")
    status, output = launch(tmp_path / "log", tmp_path / "script.py", "--flag", ranks=2, launcher=forked, seconds=60)
    assert status == 7
    assert sorted(output.splitlines()) == ["rank 0 of 2 --flag __main__", "rank 1 of 2 --flag __main__"]


def test_a_forked_process_without_a_launcher_has_its_variables_and_gets_its_signals(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print(os.environ.get('RANK'), os.environ['SLURM_PROCID'], 'torch' in sys.modules, flush=True)\n"
        "time.sleep(99)"
    )
    log, environment = tmp_path / "log", {**without_launcher(), **srun(1)}
    with running(forked(tmp_path / "script.py", ranks=0), log, env=environment) as process:
        wait_until(lambda: log.read_text() == "None 1 True\n", "it does not start")
        process.send_signal(signal.SIGTERM)
        assert process.wait(limit(60)) == 75


def test_an_error_of_a_forked_rank_is_printed(tmp_path):
    (tmp_path / "script.py").write_text("raise ValueError('of the script')")
    status, output = launch(tmp_path / "log", tmp_path / "script.py", launcher=forked)
    assert status == 1
    assert "ValueError: of the script" in output


def test_a_forked_command_has_the_output_and_the_status_of_its_script(tmp_path):
    script = tmp_path / "script.py"
    code = "import os, sys\nprint('torch' in sys.modules, os.getcwd(), os.environ['A'], sys.argv[1])\nsys.exit(3)"
    script.write_text(code)
    command = [*forked_command(), str(script), "b"]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "A": "a"}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, f"True {tmp_path} a b\n")


def test_a_script_ends_with_its_forked_command(tmp_path):
    script, started = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(f"import os, time\nopen({str(started)!r}, 'w').write(f'{{os.getpid()}} ')\ntime.sleep(99)")
    with subprocess.Popen([*forked_command(), str(script)]) as process:
        wait_until(lambda: started.exists() and started.read_text().endswith(" "), "it does not start")
        process.kill()
    wait_until(lambda: not psutil.pid_exists(int(started.read_text())), "the script is still alive")
