"""Print the JSON schema (draft 2020-12) of the configuration file.

Example:
  slw schema > run.schema.json

An editor that knows the schema completes keys, shows their descriptions and marks wrong ones. Name it in the first line of
the file: "$schema": "run.schema.json".
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from seqlen_curriculum.cli.flags import Parser


def parser() -> Parser:
    return Parser(prog="slw schema", description=__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    parser().parse_args(argv)
    from seqlen_curriculum.config.schema import run_schema  # after --help: pydantic takes a moment

    print(json.dumps(run_schema(), indent=2))
