"""A stand-in for ``slw train`` that writes a run folder by formula, so that studies are tested without training.

The final loss is 3 plus 0.1 per factor of two between the rate and 0.004, plus a thousandth of the seed. It falls by 0.2 per
quarter of the run, whose steps take 2 s of CPU time. With a curriculum it is 0.3 lower and steps take 1 s. A rate above 0.1
diverges after the first step. Every start is noted in ``starts.txt`` of the study. A file ``fail`` there makes a run fail,
one named ``wait`` makes it wait until it is deleted or SIGTERM arrives.
"""

import json
import math
import sys
import time
from pathlib import Path

_, config, _, save = sys.argv
config, save = json.loads(Path(config).read_text()), Path(save)
study = save.parents[2]
with (study / "starts.txt").open("a") as starts:
    starts.write(f"{save.relative_to(study / 'runs')}\n")
while (study / "wait").exists():
    time.sleep(0.02)
if (study / "fail").exists():
    sys.exit("error: no memory left")
rate, seed = config["optimizer"]["params"]["lr"], config["training"]["seed"]
ramps, budget = "curriculum_learning" in config, config["training"]["train_tokens"]
final = 3 + 0.1 * abs(math.log2(rate / 0.004)) + seed / 1000 - 0.3 * ramps
save.mkdir(exist_ok=True)
launch = {"started": "", "ranks": 1, "first_step": 1, "versions": {}, "device": {"accelerator": None}}
(save / "run.json").write_text(json.dumps({"config": config, "launches": [launch]}))
with (save / "runlog.jsonl").open("w") as log:
    for step in range(1, 5):
        at = {"step": step, "consumed_tokens": budget * step // 4}
        loss = final + 0.2 * (4 - step)
        record = {
            **at,
            "seqlen": 8 if ramps and step < 3 else 32,
            "rows": 8,
            "loss": loss,
            "lr": rate,
            "grad_norm": 1.0,
        }
        moments = {"variance_norm": 0.1 * step, "variance_max": 0.01 * step * step}
        log.write(json.dumps({**record, **moments, "seconds": 9.0, "cpu_seconds": 2.0 - ramps}) + "\n")
        if rate > 0.1:
            print("error: the loss is nan")
            sys.exit(3)
        log.write(json.dumps({**at, "valid_loss": loss, "valid_ppl": math.exp(loss), "seconds": 5.0}) + "\n")
