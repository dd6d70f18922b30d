"""Readers of the files of W&B and TensorBoard, without a server."""

import json
import struct

_BLOCK = 32768


def wandb_history(folder):
    """Return the rows, in order, of the only offline W&B run below ``folder``."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in _wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def wandb_axes(folder):
    """Return the axis of each group of values in that run."""
    metrics = [one.metric for one in _wandb_records(folder) if one.WhichOneof("record_type") == "metric"]
    return {metric.glob_name: metric.step_metric for metric in metrics}


def _wandb_records(folder):
    from wandb.proto import wandb_internal_pb2 as messages

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return [messages.Record.FromString(one) for one in _leveldb_log(path.read_bytes()[7:])]


def _leveldb_log(data):
    """Yield the records of a LevelDB log whose first block lacks the 7 bytes of W&B's header."""
    at, record = 0, b""
    while at + 7 <= len(data):
        left = _BLOCK - (at + 7) % _BLOCK
        if left < 7:  # a block is padded with zeros if no header fits
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def tensorboard_scalars(folder):
    """Return (position, value) pairs by tag from the event files in ``folder``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
