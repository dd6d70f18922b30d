"""Changes of nested settings."""

import json


def changed(run, **changes):
    """The run with ``a.b`` of it, written ``a__b``, replaced."""
    run = json.loads(json.dumps(run))
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = run
        for parent in parents:
            section = section[parent]
        section[key] = value
    return run
