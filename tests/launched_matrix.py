"""Run by test_matrix.py and test_spikes.py: one run after the other in one launch, each trained or continued.

usage: launched_matrix.py RUNS_JSON, a list of {"config", "sets", "save", "resume"} and perhaps "no_compiler", and
"fails" for a run that ends with an error, whose words go into SAVE/error; "goes_on_from" is another run's folder, which SAVE
begins as a copy of; "until_step" is the last to train; "sigterm_at" is a file: once it is there, each rank gets a SIGTERM
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import deepspeed
import torch
import torch._inductor.config

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.errors import SeqlenCurriculumError
from seqlen_curriculum.training.pretrain import pretrain

COMPILERS = torch._inductor.config.cpp.cxx


def sigterm_once(path):
    def wait():
        while not path.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main():
    deepspeed.init_distributed()
    for run in json.loads(Path(sys.argv[-1]).read_text()):
        config = RunConfig.load(run["config"], run["sets"], require=("optimizer", "model", "data", "training"))
        save = Path(run["save"])
        save.mkdir(parents=True, exist_ok=True)
        if "goes_on_from" in run and torch.distributed.get_rank() == 0:
            shutil.copytree(run["goes_on_from"], save, dirs_exist_ok=True)
        torch.distributed.barrier()
        torch._inductor.config.cpp.cxx = ("nowhere/g++",) if run.get("no_compiler") else COMPILERS
        torch._dynamo.utils.counters.clear()
        if "sigterm_at" in run:
            sigterm_once(Path(run["sigterm_at"]))
        try:
            pretrain(config, *open_run_data(config), save, run["resume"], run.get("until_step"))
        except SeqlenCurriculumError as error:
            if not run.get("fails"):
                raise
            (save / "error").write_text(str(error))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        (save / "graphs.json").write_text(json.dumps(graphs and graphs - 1))  # one is that of the compiler's trial


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
