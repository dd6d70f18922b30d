"""Measure this machine: throughput at every sequence length, here or in Hugging Face's Trainer, data loading, the index of
document pieces, attention that stops at document ends, or the overhead of the training loop.

Example:
  slw benchmark throughput run.json --rounds 5 --png throughput.png
  slw benchmark trainer run.json --lengths 8 16 32 64
  slw benchmark data run.json --set data.leftovers=recycle
  slw benchmark pieces run.json --set data.order=decomposed --documents 1e8
  slw benchmark documents run.json --steps 4 --rounds 20
  slw benchmark loop run.json --set model.num_layers=4
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.cli.flags import Parser, add_json, add_launcher_flags, add_overwrite, add_run_file
from seqlen_curriculum.cli.launching import add_ranks, check_ranks, check_this_machine, local_ranks, start_ranks
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import output_file, picture_path, replace_text, writable_folder
from seqlen_curriculum.launchers import global_rank, launch


def parser() -> Parser:
    flags = Parser(prog="slw benchmark", description=__doc__)
    add_launcher_flags(flags)
    kinds = flags.add_subparsers(
        title="measurements", required=True, metavar="throughput|trainer|data|pieces|documents|loop"
    )
    throughput = kinds.add_parser("throughput", help="measure tokens/s at every sequence length")
    throughput.set_defaults(measure=measure_throughput)
    trainer = kinds.add_parser(
        "trainer", help="measure tokens/s in Hugging Face's Trainer at every sequence length, plain and balanced"
    )
    trainer.set_defaults(measure=measure_trainer)
    for kind in (throughput, trainer):
        kind.add_argument(
            "--lengths",
            nargs="+",
            type=int,
            metavar="S",
            help="sequence lengths (default: 8, 16, 32, ... up to data.seq_length)",
        )
        kind.add_argument(
            "--png",
            type=Path,
            metavar="PATH",
            help="plot tokens/s against sequence length to a .png, .pdf or .svg file",
        )
    throughput.add_argument(
        "--kinds",
        nargs="+",
        default=["fixed", "balanced"],
        choices=["fixed", "balanced", "segment", "window"],
        help="how samples are shortened: truncated in fixed or balanced micro-batches, segments or windows (default: fixed "
        "balanced)",
    )
    throughput.add_argument(
        "--device", default="auto", help="auto (default), or the name of a DeepSpeed accelerator, for example cpu"
    )
    add_ranks(throughput)
    trainer.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu"],
        help="auto (default): a GPU, if torch sees one; the first, if it sees several",
    )
    trainer.add_argument(
        "--steps", type=int, default=2, metavar="N", help="consecutive steps of a length in a round (default: 2)"
    )
    data = kinds.add_parser("data", help="measure how fast samples are located and read, compared with numpy")
    data.set_defaults(measure=measure_data)
    data.add_argument(
        "--find-tokens",
        type=float,
        default=157e9,
        metavar="N",
        help="size of the sparse file in which samples are located, in tokens (default: 157e9)",
    )
    data.add_argument(
        "--read-tokens",
        type=float,
        default=500e6,
        metavar="N",
        help="size of the file that is read, in tokens (default: 500e6, which is 1 GB)",
    )
    pieces = kinds.add_parser("pieces", help="measure the index of document pieces that a decomposed run reads")
    pieces.set_defaults(measure=measure_pieces)
    pieces.add_argument(
        "--documents", type=float, default=1e6, metavar="N", help="documents of the sparse corpus (default: 1e6)"
    )
    for kind in (data, pieces):
        kind.add_argument(
            "--folder",
            type=Path,
            metavar="PATH",
            help="folder for the files, which are removed at the end (default: the system's temporary folder)",
        )
    loop = kinds.add_parser(
        "loop", help="compare the CPU time of the training loop with a bare DeepSpeed loop, on one rank"
    )
    loop.set_defaults(measure=measure_loop)
    loop.add_argument("--steps", type=int, default=1, metavar="N", help="steps of each loop in a round (default: 1)")
    documents = kinds.add_parser(
        "documents",
        help="compare attention within rows, within documents and on document pieces, at equal tokens per step, on one rank",
    )
    documents.set_defaults(measure=measure_documents)
    documents.add_argument("--steps", type=int, default=4, metavar="N", help="steps of each in a round (default: 4)")
    for kind, rounds in ((throughput, 5), (trainer, 5), (data, 20), (pieces, 20), (loop, 300), (documents, 10)):
        add_run_file(kind)
        kind.add_argument(
            "--rounds", type=int, default=rounds, help=f"number of rounds; the median is reported (default: {rounds})"
        )
        add_json(kind)
        kind.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object of --json to a file")
        add_overwrite(kind, "--out", *(["--png"] if kind in (throughput, trainer) else []))
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    if args.rounds < 1:
        raise ConfigError(f"--rounds: {args.rounds} is not valid; give 1 or more")
    if args.out:
        output_file("--out", args.out, args.overwrite)
    args.measure(args, words)


def measure_throughput(args: argparse.Namespace, words: Sequence[str]) -> None:
    if args.png:
        picture_path("--png", args.png, args.overwrite)
    check_ranks(args.ranks)

    from seqlen_curriculum.config.run import RunConfig  # after --help: numpy and pydantic take a moment

    config = RunConfig.load(args.config, args.set, require=("optimizer", "model", "data"))
    assert config.data is not None
    lengths = measured_lengths(args.lengths, config.data.seq_length)
    if args.device != "auto":
        os.environ["DS_ACCELERATOR"] = args.device
    if launch() is None:
        ranks = local_ranks(args.ranks)
        check_this_machine(config.deepspeed)
        start_ranks(ranks, "seqlen_curriculum", ["benchmark", *words])

    from seqlen_curriculum.training.benchmark import measure_throughput

    records = measure_throughput(config, lengths, args.rounds, args.kinds)
    if global_rank() != 0:
        return
    from seqlen_curriculum.analysis.benchmark import draw_throughput, throughput_table

    show(args, {"throughput": records}, throughput_table(records))
    if args.png:
        draw_throughput(records, args.png)


def measured_lengths(given: list[int] | None, seq_length: int) -> list[int]:
    """Return the lengths of ``--lengths``, or 8, 16, 32, ... up to ``seq_length``. Raises ConfigError."""
    lengths = given or [8 << doubling for doubling in range(24) if 8 << doubling <= seq_length]
    if not all(1 <= seqlen <= seq_length for seqlen in lengths):
        raise ConfigError(
            f"--lengths {lengths}: some are not from 1 to data.seq_length, {seq_length}; give other lengths"
        )
    return lengths


def measure_trainer(args: argparse.Namespace, words: Sequence[str]) -> None:  # noqa: ARG001 - as the others
    from seqlen_curriculum.config.run import RunConfig

    config = RunConfig.load(args.config, args.set, require=("model", "data"))
    assert config.data is not None
    lengths = measured_lengths(args.lengths, config.data.seq_length)
    if args.steps < 1:
        raise ConfigError(f"--steps: {args.steps} is not valid; give 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']} ranks, but the trainer is measured on one; start one"
        )
    if args.png:
        picture_path("--png", args.png, args.overwrite)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several, the Trainer would use DataParallel

    from seqlen_curriculum.analysis.benchmark import describe_trainer, draw_throughput
    from seqlen_curriculum.integrations.trainer_benchmark import measure_trainer

    with tempfile.TemporaryDirectory() as folder:
        result = measure_trainer(config, lengths, args.rounds, args.steps, Path(folder), args.device)
    show(args, result, describe_trainer(result))
    if args.png:
        draw_throughput(result["trainer"], args.png)


def measure_data(args: argparse.Namespace, words: Sequence[str]) -> None:  # noqa: ARG001 - as the other two
    from seqlen_curriculum.config.run import RunConfig

    config = RunConfig.load(args.config, args.set, require=("data", "training"))
    assert config.data is not None
    rows, seq_length = config.global_batch, config.data.seq_length
    if min(args.find_tokens, args.read_tokens) < 100 * seq_length:
        raise ConfigError(
            f"--find-tokens {args.find_tokens:g}, --read-tokens {args.read_tokens:g}: give at least 100 times "
            f"data.seq_length, {100 * seq_length}"
        )
    if args.folder:
        writable_folder("--folder", args.folder)

    from seqlen_curriculum.data import benchmark

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        finding = benchmark.measure_finding(config, Path(folder), int(args.find_tokens), 50 * args.rounds)
        reading = benchmark.measure_reading(Path(folder), int(args.read_tokens), rows, seq_length, args.rounds)
    text = f"{benchmark.describe_finding(finding)}\n{benchmark.reading_table(reading)}"
    show(args, {"finding": finding, "reading": reading}, text)


def measure_pieces(args: argparse.Namespace, words: Sequence[str]) -> None:  # noqa: ARG001 - as the others
    from seqlen_curriculum.config.run import RunConfig

    config = RunConfig.load(args.config, args.set, require=("data", "training"))
    if config.decomposed is None:
        raise ConfigError('data.order: "packed" has no pieces of documents; give --set data.order=decomposed')
    if not 2 <= args.documents < 2**31:
        raise ConfigError(f"--documents {args.documents:g}: is not valid; give 2 to 2e9")
    if args.folder:
        writable_folder("--folder", args.folder)

    from seqlen_curriculum.data import piece_benchmark

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        record = piece_benchmark.measure_pieces(config, Path(folder), int(args.documents), 50 * args.rounds)
    show(args, {"pieces": record}, piece_benchmark.describe_pieces(record))


def measure_loop(args: argparse.Namespace, words: Sequence[str]) -> None:  # noqa: ARG001 - as the other two
    from seqlen_curriculum.config.run import RunConfig

    config = RunConfig.load(args.config, args.set, require=("optimizer", "model", "data", "training"))
    be_one_rank(args, config.plan.steps)

    from seqlen_curriculum.analysis.benchmark import describe_loop
    from seqlen_curriculum.training.loop_benchmark import measure_loop

    with tempfile.TemporaryDirectory() as folder:
        record = measure_loop(config, Path(folder), args.steps, args.rounds)
    show(args, record, describe_loop(record))


def measure_documents(args: argparse.Namespace, words: Sequence[str]) -> None:  # noqa: ARG001 - as the others
    from seqlen_curriculum.config.run import RunConfig

    config = RunConfig.load(args.config, args.set, require=("optimizer", "model", "data", "training"))
    assert config.training is not None
    be_one_rank(args, config.training.train_tokens // (config.global_batch * config.shortening.seq_length))

    from seqlen_curriculum.analysis.benchmark import describe_documents
    from seqlen_curriculum.training.document_benchmark import measure_documents

    with tempfile.TemporaryDirectory() as folder:
        record = measure_documents(config, Path(folder), args.steps, args.rounds)
    show(args, record, describe_documents(record))


def be_one_rank(args: argparse.Namespace, run_steps: int) -> None:
    """Make this process a launch of one rank. Raises ConfigError if ``--steps`` and ``--rounds`` exceed the run's steps."""
    if args.steps < 1 or (args.rounds + 1) * args.steps > run_steps:
        raise ConfigError(
            f"--steps {args.steps}: {args.rounds + 1} rounds of it must be 1 to {run_steps} steps, the run's length"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']} ranks, but the loops are compared on one; start one rank"
        )
    if "RANK" not in os.environ:  # without a launcher, this is a launch of one process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(variables)


def show(args: argparse.Namespace, numbers: dict[str, Any], text: str) -> None:
    """Print the result as text, or with --json as JSON, and write it to --out."""
    print(json.dumps(numbers, indent=2) if args.json else text)
    if args.out:
        replace_text(args.out, json.dumps(numbers, indent=2) + "\n")
