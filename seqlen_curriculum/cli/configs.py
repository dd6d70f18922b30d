"""List, print and copy the configurations and studies that come with the package.

Example:
  slw configs list
  slw configs show mini/slw_calm
  slw configs copy tiny_cpu --out run.json

The JSON schema, with which editors complete and check a run's file, is copied to the same folder.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.cli.common import see
from seqlen_curriculum.cli.flags import Parser, add_json, add_overwrite
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import output_file, read_json, replace_text
from seqlen_curriculum.shipped import RUN_SCHEMA, shipped_configs, shipped_folder, shipped_studies


def parser() -> Parser:
    flags = Parser(prog="slw configs", description=__doc__)
    actions = flags.add_subparsers(title="actions", required=True, metavar="list|show|copy")
    listing = actions.add_parser("list", help="list the configurations and their sizes")
    listing.set_defaults(action=list_configs)
    add_json(listing)
    show = actions.add_parser("show", help="print a configuration")
    show.set_defaults(action=show_config)
    copy = actions.add_parser("copy", help="copy a configuration to a new file")
    copy.set_defaults(action=copy_config)
    for action in (show, copy):
        action.add_argument("name", metavar="NAME", help="name in the list; the last part is enough if it is unique")
    copy.add_argument(
        "--out", type=Path, metavar="PATH", help="file or folder to copy to (default: the current folder)"
    )
    add_overwrite(copy, "--out")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.action(args)


def find_config(name: str) -> Path:
    """Return the file of the configuration or study ``name``. Raises ConfigError that lists the nearest names."""
    configs = {**shipped_configs(), **shipped_studies()}
    wanted = name.removesuffix(".json")
    found = [known for known in configs if wanted in (known, known.rpartition("/")[2])]
    if len(found) != 1:
        from seqlen_curriculum.fields import nearest

        raise ConfigError(see(f"NAME {name}: no such configuration{nearest(wanted, configs)}", "slw configs list"))
    return configs[found[0]]


def list_configs(args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = [{"name": name, **sizes(path)} for name, path in shipped_configs().items()]
    if args.json:
        print(json.dumps({"configs": rows, "studies": list(shipped_studies())}, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    print(f"{'name':<{width}} {'parameters':>10} {'tokens':>7}  {'batch size':<12} sequence length")
    for row in rows:
        steps = f", full from step {row['full_length_step']:,}" if (row["full_length_step"] or 1) > 1 else ""
        print(
            f"{row['name']:<{width}} {_short(row['parameters']):>10} {_short(row['train_tokens']):>7}  "
            f"{_from_to(row['first_batch_size'], row['batch_size']):<12} "
            f"{_from_to(row['first_seqlen'], row['seq_length'])}{steps}"
        )
    print(f"\nstudies, for slw study: {', '.join(shipped_studies())}")


def continues_a_model(path: Path) -> bool:
    """Return whether a configuration needs the folder of a model, which ``--hf-checkpoint`` gives."""
    model = read_json(path, comments=True).get("model")
    return isinstance(model, dict) and "rope" in model and "hf_checkpoint" not in model


def sizes(path: Path) -> dict[str, Any]:
    """Return the parameters of the model, the token budget, and the first and the full batch size and sequence length.

    The parameters are None for a configuration that continues the user's model. If the lengths depend on the corpus, the
    first length is the shortest one, and ``full_length_step`` is None.
    """
    from seqlen_curriculum.config.run import RunConfig  # after --help: numpy and pydantic take a moment

    overrides = ["model=null"] if continues_a_model(path) else []
    config = RunConfig.load(path, overrides, require=("data", "training"))
    assert config.data is not None
    known = {
        "parameters": config.model.parameter_count() if config.model else None,
        "train_tokens": config.train_tokens,
        "batch_size": config.global_batch,
        "seq_length": config.data.seq_length,
    }
    if config.needs_buckets:
        shortest = config.data.shortest_piece
        rows = config.global_batch * config.data.seq_length // shortest
        return {**known, "first_batch_size": rows, "first_seqlen": shortest, "full_length_step": None}
    timeline = config.timeline()
    return {
        **known,
        "first_batch_size": timeline.samples(1),
        "first_seqlen": timeline.seqlen(1),
        "full_length_step": timeline.first_step_at(config.data.seq_length),
    }


def _from_to(first: int, last: int) -> str:
    return f"{last:,}" if first == last else f"{first:,} to {last:,}"


def _short(number: int | None) -> str:
    """Format a count as in papers: 124M, 1.56B."""
    if number is None:
        return "yours"
    unit, size = next(pair for pair in (("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)) if number >= pair[1])
    return f"{number / size:.3g}{unit}"


def show_config(args: argparse.Namespace) -> None:
    print(find_config(args.name).read_text(encoding="utf-8"), end="")


def copy_config(args: argparse.Namespace) -> None:
    source = find_config(args.name)
    target = args.out or Path()
    if target.is_dir():
        target /= source.name
    output_file("--out", target, args.overwrite)
    schema = target.with_name(RUN_SCHEMA)
    text = re.sub(r'("\$schema"\s*:\s*)"[^"]*"', rf'\1"{RUN_SCHEMA}"', source.read_text(encoding="utf-8"), count=1)
    try:
        replace_text(target, text)
        if not schema.exists() and source not in shipped_studies().values():
            shutil.copy(shipped_folder("configs") / RUN_SCHEMA, schema)
    except OSError as error:
        raise ConfigError(f"--out {target}: can't be written ({error.strerror}); choose another file") from error
    print(target)
