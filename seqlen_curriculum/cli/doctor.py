"""Check this machine without launching anything: versions, devices, compiler, memory, ports, locks, disk, launchers, extras.

Example:
  slw doctor
  slw doctor /scratch/runs
  slw doctor --json

Each line is ok, warning (some runs need it) or missing (training needs it), and says what to install or type. The exit
status is 0 if training can run here, else 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.cli.flags import Parser, add_json
from seqlen_curriculum.errors import ConfigError


def parser() -> Parser:
    flags = Parser(prog="slw doctor", description=__doc__)
    flags.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="where runs will be saved; its locks and disk space are checked (default: the current folder)",
    )
    add_json(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not args.folder.is_dir():
        raise ConfigError(f"FOLDER {args.folder}: not a folder; give one that exists")

    from seqlen_curriculum.training.doctor import can_train, examine

    findings = []
    for finding in examine(args.folder):
        findings.append(finding)
        if not args.json:
            text = f"{finding.found}; {finding.fix}" if finding.fix else finding.found
            print(f"{finding.state:<9}{finding.name:<14}{text}", flush=True)
    ready = can_train(findings)
    if args.json:
        print(json.dumps({"can_train": ready, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        print(
            f"\n{'Training can run here.' if ready else 'Training cannot run here until the missing lines are fixed.'}"
        )
    return 0 if ready else 1
