"""Write every value to DeepSpeed's monitors (TensorBoard, W&B, CSV, Comet) against steps and against consumed tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Monitors"]

Event = tuple[str, float, int]  # name, value, position on the axis
_AXES = {"": "step", "-by-tokens": "consumed_tokens"}
"""The axis of a group of values, by the suffix of the group's name."""


class Monitors:
    """Writer to the monitors opened by ``master``, DeepSpeed's ``engine.monitor``; on rank 0 only."""

    def __init__(self, master: Any, groups: Sequence[str]) -> None:
        """Open the monitors. ``groups`` are the first parts of all names, such as ``Train``."""
        self._wandb, self._csv = master.wandb_monitor, None
        self._others = [one for one in (master.tb_monitor, master.comet_monitor) if one is not None]
        if master.csv_monitor is not None:
            self._csv = _CsvFiles(Path(master.csv_monitor.log_dir))
        if self._wandb is not None:
            import wandb

            for group in groups:
                for suffix, axis in _AXES.items():
                    wandb.define_metric(f"{group}{suffix}/*", step_metric=axis)

    def write(self, group: str, values: Mapping[str, float], step: int, consumed_tokens: int) -> None:
        """Write the ``values`` of a step as ``group/name`` and, against tokens, as ``group-by-tokens/name``."""
        places = {"step": step, "consumed_tokens": consumed_tokens}
        events: list[Event] = [
            (f"{group}{suffix}/{name}", value, places[axis])
            for suffix, axis in _AXES.items()
            for name, value in values.items()
        ]
        for monitor in self._others:
            monitor.write_events(events)
        if self._csv is not None:
            self._csv.write_events(events)
        if self._wandb is not None:
            # Without ``step=``, because W&B ignores a row whose step is below that of an earlier row. A rollback repeats
            # steps, and DeepSpeed logs its own values against the number of samples, far above the number of steps.
            self._wandb.log({name: value for name, value, _ in events} | places)

    def close(self) -> None:
        """Close the files opened by this object."""
        if self._csv is not None:
            self._csv.close()


class _CsvFiles:
    """The files of DeepSpeed's ``csv_monitor``, each opened once. DeepSpeed itself opens a file for every value."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, TextIO] = {}

    def write_events(self, events: Sequence[Event]) -> None:
        for name, value, place in events:
            file = self._files.get(name) or self._open(name)
            file.write(f"{place},{value}\n")

    def _open(self, name: str) -> TextIO:
        path = self._folder / f"{name.replace('/', '_')}.csv"
        file = self._files[name] = path.open("a", buffering=1, encoding="utf-8")  # line buffered
        if file.tell() == 0:
            file.write(f"step,{name.rsplit('/', 1)[-1]}\n")
        return file

    def close(self) -> None:
        for file in self._files.values():
            file.close()
