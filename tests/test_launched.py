"""Every launcher starts train_gpt2.py, with its customary flags; a run that a signal stops has an exit status of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import launchers
from helpers.capabilities import require_launches
from helpers.launching import ROOT, forked, limit, running, start, stop, wait_until
from helpers.runs import TRAIN, has_reached, records

from seqlen_curriculum.errors import STOPPED

COMMANDS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable],
    "srun": ["srun", "--ntasks=2", "--overcommit", "--kill-on-bad-exit=1", sys.executable],
}


@pytest.fixture(scope="session")
def run_file(tmp_path_factory, tiny_run):
    path = tmp_path_factory.mktemp("configs") / "run.json"
    path.write_text(json.dumps(tiny_run))
    return path


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun",
        pytest.param("mpirun", marks=[pytest.mark.needs("mpirun"), pytest.mark.slow]),
        pytest.param("srun", marks=pytest.mark.needs("slurm")),
    ],
)
def test_every_launcher_starts_it(launcher, run_file, tmp_path):
    require_launches()
    flags = ["--deepspeed", "--deepspeed_config", run_file, "--save", tmp_path / "run", "--until-step", 2]
    command = [*COMMANDS[launcher], str(ROOT / TRAIN), *map(str, flags)]
    log = tmp_path / "log"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    # As in a shell where nothing is activated: ninja is beside Python, and found there.
    environment["PATH"] = os.environ["PATH"].replace(f"{Path(sys.executable).parent}{os.pathsep}", "")
    with running(command, log, env=environment) as process:
        wait_until(lambda: process.poll() is not None, "the run hung", seconds=300)
    assert process.returncode == 0, log.read_text()
    assert [record["step"] for record in records(tmp_path / "run")[0]] == [1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["launches"][0]["ranks"] == 2


def test_ranks_that_slurm_stops_are_saved_and_exit_with_a_status_of_their_own(run_file, tmp_path):
    require_launches()
    save = tmp_path / "run"
    command = forked(TRAIN, "--config", run_file, "--save", save, ranks=0)
    extensions = tmp_path / "torch_extensions"
    shutil.copytree(
        os.environ["TORCH_EXTENSIONS_DIR"], extensions, ignore=shutil.ignore_patterns("fused_adam", "cpu_adam")
    )
    lock = extensions / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()  # as of a killed compilation
    plain = {**launchers.without_launcher(), "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(extensions)}
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in (0, 1):
            environment = {**plain, **launchers.srun(rank, job=os.getpid())}
            ranks.append(start(command, tmp_path / f"log{rank}", env=environment))
            stack.callback(stop, ranks[-1])
        wait_until(lambda: any(rank.poll() is not None for rank in ranks) or has_reached(save, 3), "the run hung", 300)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        # srun ends the other ranks when one exits with a status: theirs must not become that of a killed process.
        wait_until(lambda: any(rank.poll() is not None for rank in ranks), "the run hung")
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(signal.SIGTERM)
        statuses = [rank.wait(timeout=limit(120)) for rank in ranks]
    logs = [(tmp_path / f"log{rank}").read_text() for rank in (0, 1)]
    assert statuses == [STOPPED, STOPPED], logs
    stopped = len(records(save)[0])
    assert f"stopped after step {stopped} by a signal, and saved" in logs[0]
    assert (save / f"global_step{stopped}" / "complete.json").exists()
    assert f"removed {lock}: left by a killed compilation" in logs[0]


@pytest.mark.needs("slurm")
def test_the_status_reaches_the_batch_script_under_slurm(run_file, tmp_path):
    require_launches()
    save = tmp_path / "run"
    arguments = [str(ROOT / TRAIN), "--config", str(run_file), "--save", str(save)]
    command = ["srun", "--job-name=stopped", *COMMANDS["srun"][1:], *arguments]
    with running(command, tmp_path / "log") as process:
        wait_until(lambda: process.poll() is not None or has_reached(save, 3), "the run hung", seconds=300)
        subprocess.run(["scancel", "--signal=TERM", "--name=stopped"], check=True)
        wait_until(lambda: process.poll() is not None, "the run hung")
    assert process.returncode == STOPPED, (tmp_path / "log").read_text()
