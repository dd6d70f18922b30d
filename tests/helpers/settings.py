"""Settings of runs and schedules, and changes to them."""

import copy
import json


def changed(run, **changes):
    """Return the run with changed settings; ``a__b`` replaces ``a.b``."""
    run = json.loads(json.dumps(run))
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = run
        for parent in parents:
            section = section[parent]
        section[key] = value
    return run


LINEAR = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": 1024,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8},
}


def block(schedule=None, **changes):
    """Return a ``curriculum_learning`` block with another ``schedule_config`` and other keys."""
    changed = {**copy.deepcopy(LINEAR), **changes}
    changed["schedule_config"] = changed["schedule_config"] if schedule is None else schedule
    return changed
