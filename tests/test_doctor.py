"""What slw doctor finds: each judgment with findings given by hand, and one real run."""

import fcntl
import json
import subprocess
import sys

import pytest
from helpers.command import slw
from helpers.launching import ROOT, limit

from seqlen_curriculum.files import read_json
from seqlen_curriculum.shipped import shipped_configs
from seqlen_curriculum.training import doctor, facts
from seqlen_curriculum.training.doctor import Finding, can_train

GIB, SHM = 2**30, 67 * 2**20
VERSIONS = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "tokenizers": "0.23.3"}
CHECKS = [
    *("Python", "packages", "devices", "precision", "compiler", "CUDA toolkit", "/dev/shm"),
    *("memory", "port", "locks", "disk", "Hub", "launchers", "extras"),
]


@pytest.mark.parametrize(
    ("finding", "state", "words", "fix"),
    [
        (doctor.packages(VERSIONS), "ok", "deepspeed 0.19.8", ""),
        (
            doctor.packages(VERSIONS | {"deepspeed": "0.20.0"}),
            "warning",
            "deepspeed 0.20.0 is outside the tested range deepspeed>=0.19,<0.20",
            'pip install "deepspeed>=0.19,<0.20"',
        ),
        (
            doctor.packages(VERSIONS | {"torch": "", "deepspeed": ""}),
            "missing",
            "no torch, deepspeed",
            "pip install 'seqlen-curriculum[train]'",
        ),
        (doctor.devices(["NVIDIA H100 (80 GiB)"] * 8, True, "12.8"), "ok", "8 x NVIDIA H100 (80 GiB)", ""),
        (doctor.devices([], False, None), "ok", "no GPU", ""),
        (doctor.devices([], True, None), "warning", "this torch is a CPU build", "install torch's CUDA build"),
        (doctor.devices([], True, "12.8"), "warning", "torch for CUDA 12.8 finds no GPU", "check the driver"),
        (doctor.precisions({"fp16": True, "bf16": True}), "ok", "fp32, fp16, bf16", ""),
        (doctor.precisions({"fp16": False, "bf16": True}), "ok", "fp32, bf16; no fp16", ""),
        (doctor.compiler("", "", True, True), "ok", "compiles a C++ part at the first run", ""),
        (doctor.compiler("", "", False, True), "ok", "nothing is left to compile", ""),
        (doctor.compiler("no ninja", "pip install ninja", True, True), "missing", "no ninja", "pip install ninja"),
        (doctor.compiler("no ninja", "pip install ninja", False, True), "warning", "compiled already", "pip install"),
        (
            doctor.compiler("no ninja", "pip install ninja", False, False),
            "warning",
            "training on a GPU needs no compiler",
            "pip install",
        ),
        (doctor.cuda_toolkit(None), "ok", "not needed", ""),
        (doctor.shared_memory(GIB, SHM), "ok", "1,024 MiB free: room for 15 CPU ranks of 67 MiB", ""),
        (doctor.shared_memory(2 * SHM - 1, SHM), "warning", "room for 1 CPU ranks", "--shm-size=1g"),
        (doctor.shared_memory(64 << 20, SHM), "missing", "64 MiB free: room for 0 CPU ranks", "--shm-size=1g"),
        (doctor.cores(2, 12 * GIB), "ok", "2 cores, 12.0 GiB", ""),
        (doctor.cores(2, GIB), "warning", "1.0 GiB", "free 2 GiB"),
        (doctor.cores(2, None), "ok", "2 cores", ""),
        (doctor.port(True, True), "ok", "29500", ""),
        (doctor.port(False, True), "warning", "29500, DeepSpeed's default, is in use", "--master_port N"),
        (doctor.port(False, False), "missing", "can't listen on any port", "allow this process"),
        (doctor.disk(ROOT, 20 * GIB), "ok", "20.0 GiB free", ""),
        (doctor.disk(ROOT, GIB // 2), "warning", "0.5 GiB free", "16 bytes per parameter"),
        (doctor.hub(""), "ok", "reachable", ""),
        (doctor.hub("no answer in 3 s"), "warning", "not reachable (no answer in 3 s); local files don't need it", ""),
        (doctor.extras({"train": True, "eval": True}), "ok", "train, eval", ""),
        (doctor.extras({"train": False, "eval": True}), "ok", "eval", ""),
        (
            doctor.extras({"train": True, "eval": False, "monitor": False}),
            "ok",
            "train; optional: eval, monitor",
            "pip install 'seqlen-curriculum[eval,monitor]'",
        ),
    ],
    ids=lambda value: f"{value.name} {value.found[:30]}" if isinstance(value, Finding) else "",
)
def test_each_judgment(finding, state, words, fix):
    assert finding.state == state
    assert words in finding.found
    assert fix in finding.fix
    assert bool(fix) == bool(finding.fix)


def test_training_can_run_unless_something_is_missing():
    findings = [Finding("a", "ok", ""), Finding("b", "warning", "")]
    assert can_train(findings)
    assert not can_train([*findings, Finding("c", "missing", "")])


def test_launchers_beside_python_are_found_and_named_with_what_to_type(monkeypatch):
    found = {"deepspeed": "/env/bin/deepspeed", "torchrun": "/env/bin/torchrun", "srun": None}
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/env/bin/{name}")
    assert doctor.launchers(found) == (
        "launchers",
        "ok",
        "deepspeed, torchrun; not found: srun (for several nodes)",
        "",
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.launchers(found).state == "warning"
    assert doctor.launchers(found).fix.startswith("source ")


@pytest.mark.parametrize(
    ("number", "state", "words"),
    [(doctor.errno.ENOLCK, "warning", "has no locks"), (doctor.errno.EACCES, "missing", "can't be written to")],
)
def test_a_folder_without_locks_and_one_that_is_read_only(monkeypatch, tmp_path, number, state, words):
    assert doctor.locks(tmp_path) == ("locks", "ok", f"flock works in {tmp_path}", "")

    def fail(*_):
        raise OSError(number, "failed")

    monkeypatch.setattr(fcntl, "flock", fail)
    finding = doctor.locks(tmp_path)
    assert (finding.state, bool(finding.fix)) == (state, True)
    assert words in finding.found
    assert list(tmp_path.iterdir()) == []


def test_the_hub_is_asked_within_a_limit(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert facts.hub_problem() == "HF_HUB_OFFLINE is set"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port, where nobody listens
    assert "refused" in facts.hub_problem()
    monkeypatch.setattr(facts, "_HUB_SECONDS", 0.01)
    monkeypatch.setattr(facts, "_ask_hub", lambda: facts.threading.Event().wait(1) or "")
    assert facts.hub_problem().startswith("no answer")


def test_a_compiler_that_is_missing_or_lacks_pythons_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "find_command", lambda _: None)
    assert facts.compiler_problem() == ("no ninja", "pip install ninja")
    monkeypatch.setattr(facts, "find_command", lambda name: name)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert facts.compiler_problem()[0] == "no C++ compiler no-such-compiler"
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho Python.h: No such file >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    problem, fix = facts.compiler_problem()
    assert problem.endswith("c++ can't compile a file with Python.h: Python.h: No such file")
    assert "python3-dev" in fix


def test_no_shipped_file_needs_the_cuda_toolkit():
    for name, path in shipped_configs().items():
        optimizer = read_json(path)["optimizer"]
        assert optimizer["type"] in ("Adam", "AdamW"), name
        assert optimizer["params"]["torch_adam"] is True, name


def doctor_command(*arguments, code="from seqlen_curriculum.cli import main; main()"):
    command = [sys.executable, "-c", code, "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit(120))


def test_a_real_run_in_one_screen_and_as_json(tmp_path):
    text = doctor_command(tmp_path)
    *lines, blank, last = text.stdout.splitlines()
    assert [line[9:23].strip() for line in lines] == CHECKS
    assert len(text.stdout.splitlines()) < 24
    states = {line.split()[0] for line in lines}
    assert states <= {"ok", "warning", "missing"}
    assert blank == ""
    assert (text.returncode == 0, "missing" not in states) == (last == "Training can run here.",) * 2
    answer = json.loads(slw("doctor", tmp_path, "--json").stdout)
    assert [finding["name"] for finding in answer["findings"]] == CHECKS
    assert answer["can_train"] == (text.returncode == 0)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_installation_is_a_line_of_the_report(tmp_path):
    broken = "import os; os.environ['DS_ACCELERATOR'] = 'abacus'; from seqlen_curriculum.cli import main; main()"
    result = doctor_command(tmp_path, code=broken)
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("missing")]
    assert "DeepSpeed can't be imported" in line
    assert "DS_ACCELERATOR" in line
    assert result.stdout.splitlines()[-1].startswith("Training cannot run here")


def test_a_folder_that_does_not_exist_is_one_line():
    assert slw("doctor", "nowhere") == (1, "", "error: FOLDER nowhere: not a folder; give one that exists\n")
