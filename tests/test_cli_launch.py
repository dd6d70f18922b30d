"""slw train and slw benchmark start their ranks themselves: with which command, on how many ranks, and with whose status."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys

import psutil
import pytest
from helpers import launchers
from helpers.capabilities import require_launches
from helpers.launching import ROOT, running, wait_until
from helpers.settings import changed

from seqlen_curriculum.cli import launching
from seqlen_curriculum.errors import DIVERGED, ConfigError

SLW = [sys.executable, "-m", "seqlen_curriculum"]


@pytest.fixture
def config_file(tiny_run, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(tiny_run))
    return str(tmp_path / "run.json")


@pytest.fixture
def machine(monkeypatch):
    """No launcher, no settings of DeepSpeed, and a machine with that many accelerators."""
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(launching, "launch", lambda: None)
    return lambda accelerators: monkeypatch.setattr(launching, "_accelerators", lambda: accelerators)


def test_a_rank_for_each_accelerator(machine):
    machine(4)
    assert launching.local_ranks(None) == 4
    assert launching.local_ranks(2) == 2
    assert "DS_ACCELERATOR" not in os.environ


def test_one_rank_on_a_cpu(machine, monkeypatch):
    machine(0)
    assert launching.local_ranks(None) == 1
    assert launching.local_ranks(2) == 2
    assert (os.environ["DS_ACCELERATOR"], os.environ["OMP_NUM_THREADS"]) == ("cpu", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own
    machine(4)  # which DS_ACCELERATOR=cpu leaves unused
    assert launching.local_ranks(None) == 1
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_numbers_of_ranks_that_make_no_sense(machine, monkeypatch):
    machine(0)
    with pytest.raises(ConfigError, match="--ranks: 0 is not valid"):
        launching.check_ranks(0)
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError) as missing:
        launching.local_ranks(1)
    assert missing.value.name == "deepspeed"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["run.json", "--ranks", "2", "--save", "a b"], ["run.json", "--save", "a b"]),
        (["--ranks=2", "run.json", "--set", "model.dropout=0"], ["run.json", "--set", "model.dropout=0"]),
    ],
)
def test_the_launcher_takes_the_place_of_the_command(given, kept, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(launching.os, "execv", lambda path, command: started.append((path, command)))
    monkeypatch.setattr(launching, "_free_port", lambda: 29500)
    launching.start_ranks(2, "seqlen_curriculum.train", given)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    words = ["--num_accelerators", "2", "--module", "seqlen_curriculum.train", *kept]
    assert started == [(sys.executable, [*launcher, *words])]
    assert capsys.readouterr().out == f"deepspeed {shlex.join(words)}\n"


def test_the_devices_that_the_user_shows(machine, monkeypatch):
    machine(2)
    assert "--num_accelerators" in launching.local_launcher(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    for ranks, devices in ((2, "localhost:4,5"), (1, "localhost:4")):
        command = launching.local_launcher(ranks)
        assert "--num_accelerators" not in command
        assert command[command.index("--include") + 1] == devices
    with pytest.raises(ConfigError, match=r"--ranks 3: CUDA_VISIBLE_DEVICES lists only 2 devices, 4,5"):
        launching.local_launcher(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1e0a,GPU-77b2")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES: GPU-1e0a,GPU-77b2 are not all numbers"):
        launching.local_launcher(2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "--num_accelerators" in launching.local_launcher(2)


STAND_IN = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(os.getpid(), os.environ["DS_ACCELERATOR"], *sys.argv[1:], flush=True)
signal.pause()
"""


def test_a_signal_and_the_status_pass_through(corpus, config_file, tmp_path):
    """With a module instead of DeepSpeed's launcher that prints its arguments and waits for the signal."""
    launcher = tmp_path / "deepspeed" / "launcher"
    launcher.mkdir(parents=True)
    for folder in (launcher, launcher.parent):
        (folder / "__init__.py").touch()
    (launcher / "runner.py").write_text(STAND_IN)
    environment = {**launchers.without_launcher(), "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [*SLW, "train", config_file, "--save", str(tmp_path / "run"), "--ranks=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        printed, received = process.stdout.readline(), process.stdout.readline().split()
        assert received[:2] == [str(process.pid), "cpu"]
        assert printed == f"deepspeed {shlex.join(received[2:])}\n"
        assert received[-4:] == ["seqlen_curriculum.train", config_file, "--save", str(tmp_path / "run")]
        process.terminate()
    assert process.returncode == 75


def test_a_busy_port_is_avoided(monkeypatch):
    with socket.create_server(("", 0)) as busy:
        monkeypatch.setattr(launching, "DEFAULT_PORT", busy.getsockname()[1])
        *_, flag, port = launching.local_launcher(1)
        assert flag == "--master_port"
        assert int(port) != busy.getsockname()[1]
    assert "--master_port" not in launching.local_launcher(1)


def test_a_rank_starts_no_ranks(config_file, tmp_path):
    command = [*SLW, "train", config_file, "--save", str(tmp_path / "run"), "--ranks", "2"]
    environment = {**launchers.without_launcher(), **launchers.torchrun(0)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr == "error: --ranks 2: deepspeed or torchrun has already started 2 ranks; leave it out\n"


def test_launchers_put_their_flag_first(tmp_path):
    command = [*SLW, "--local_rank=0", "evaluate", str(tmp_path), "--shots", "-1"]
    result = subprocess.run(command, capture_output=True, text=True, env=launchers.without_launcher())
    assert (result.returncode, result.stderr[:7]) == (1, "error: ")


def test_the_launched_module_by_its_path(tmp_path):
    """As slw tune starts it. The package's modules data and config don't stand before others of these names."""
    (tmp_path / "data.py").write_text("from config import found")
    (tmp_path / "config.py").write_text("found = True")
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'seqlen_curriculum')!r}); "
    code += f"runpy.run_path({str(ROOT / 'seqlen_curriculum' / 'train.py')!r}); import data; print(data.found)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "True\n", result.stderr


def test_training_starts_two_ranks_and_has_their_status(tiny_run, tmp_path):
    """In a folder with nothing but the file. The second step's loss is not finite."""
    require_launches()
    raw = changed(tiny_run, optimizer__params__lr=1e29)
    (tmp_path / "run.json").write_text(json.dumps(raw))
    command = [*SLW, "train", "run.json", "--save", "runs/a", "--ranks", "2"]
    plain = {**launchers.without_launcher(), "PYTHONPATH": str(ROOT)}
    with running(command, tmp_path / "log", cwd=tmp_path, env=plain) as process:
        lines = [psutil.Process(process.pid).cmdline()]
        wait_until(lambda: process.poll() is not None or seen(process.pid, lines), "the ranks hang")
    output = (tmp_path / "log").read_text()
    assert process.returncode == DIVERGED, output
    assert any("deepspeed.launcher.runner" in line for line in lines)  # in place of the command, not below it
    assert output.startswith("deepspeed --num_accelerators 2 ")
    assert "--module seqlen_curriculum.train run.json --save runs/a\n" in output
    assert "error: step 2: " in output
    assert json.loads((tmp_path / "runs" / "a" / "runlog.jsonl").read_text().splitlines()[0])["step"] == 1


def seen(pid, lines):
    """Add the command line that the process has by now to ``lines``. It is empty once the process has ended."""
    with contextlib.suppress(psutil.Error):
        lines.append(psutil.Process(pid).cmdline())
