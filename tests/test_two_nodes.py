"""Two nodes, as namespaces of this machine, train the run of two ranks on one node, also when one of them dies."""

import json
import os
import signal
import sys

import psutil
import pytest
from helpers.capabilities import require_launches
from helpers.launching import ROOT, running, wait_until
from helpers.runs import TRAIN, assert_same_run, has_reached, records

ONE_NODE = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / TRAIN)]
TWO_NODES = ["bash", str(ROOT / "scripts" / "two_nodes.sh")]


def train(command, log, config, save, due=lambda: False):
    """Train until the end, where the run's output is returned, or until ``due()``: then node-b is killed."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHON": sys.executable}
    with running([*command, "--config", str(config), "--save", str(save)], log, env=environment) as process:
        wait_until(lambda: process.poll() is not None or due(), "the run hung", seconds=300)
        if process.poll() is None:
            (node,) = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if child.name() == "unshare" and "node-b" in child.cmdline()
            ]
            node.send_signal(signal.SIGKILL)  # and with it all processes of that node
            wait_until(lambda: process.poll() is not None, "the other node hung", seconds=300)
    return process.returncode, log.read_text()


@pytest.mark.slow
@pytest.mark.needs("namespaces")
def test_two_nodes_train_the_run_of_two_ranks_and_survive_a_killed_node(tiny_run, tmp_path):
    require_launches()
    config = tmp_path / "run.json"
    config.write_text(json.dumps(tiny_run))
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    status, output = train(ONE_NODE, tmp_path / "log1", config, one)
    assert status == 0, output
    status, output = train(TWO_NODES, tmp_path / "log2", config, two)
    assert status == 0, output
    assert_same_run(two, one)

    status, output = train(TWO_NODES, tmp_path / "log3", config, killed, lambda: has_reached(killed, 15))
    assert status != 0, output
    assert 15 <= len(records(killed)[0]) < len(records(one)[0])
    status, output = train(TWO_NODES, tmp_path / "log4", config, killed)
    assert status == 0, output
    assert "resuming after step" in output
    assert_same_run(killed, one)
