"""What the machine lacks is said before the ranks meet; a rank takes its device before it talks to others."""

import contextlib
import importlib.util
import json
import os
import sys
from collections import namedtuple

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers import launchers
from helpers.capabilities import require_launches
from helpers.launching import forked, limit, running

from seqlen_curriculum.training import machine, start
from seqlen_curriculum.training.machine import SHM_BYTES, machine_problems

ON = {"enabled": True}
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}


@pytest.fixture
def accelerator(monkeypatch, tmp_path):
    """DeepSpeed's accelerator, as if nothing had been compiled for it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "port_problem", lambda: iter(()))
    return get_accelerator()


def problems(config, compiled=()):
    for name in compiled:
        folder = machine.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name
        folder.mkdir()
        (folder / f"{name}.so").touch()
    return list(machine_problems(config))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_precision_that_the_device_lacks_is_named_with_the_alternatives(monkeypatch, accelerator, name):
    other = {"fp16": "bf16", "bf16": "fp16"}[name]
    monkeypatch.setattr(accelerator, f"is_{name}_supported", lambda: False)
    monkeypatch.setattr(accelerator, f"is_{other}_supported", lambda: True)
    (problem,) = problems({name: ON}, ["deepspeed_shm_comm"])
    assert problem.startswith(f"{name}.enabled: true, but no GPU is seen, and this CPU has no {name}; set it to false")
    assert f'use "{other}": {{"enabled": true}} instead' in problem
    assert problems({name: {"enabled": False}, other: ON}) == []
    # A GPU without it, and without the other. torch emulates bf16 on GPUs from before Ampere.
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(accelerator, f"is_{other}_supported", lambda: None)
    monkeypatch.setattr(accelerator, "device_name", lambda *_: "cuda")
    (problem,) = problems({name: ON})
    assert f"but this cuda device has no {name}; set it to false (fp32), or start" in problem


@pytest.mark.parametrize("config", [{"optimizer": {"type": "OneBitAdam"}}, {"optimizer": {"type": "Lamb"}}])
def test_what_only_gpus_do_is_refused_without_one(accelerator, config):
    (problem,) = problems(config, ["deepspeed_shm_comm"])
    assert "needs a GPU, and none is visible" in problem


def test_a_writer_of_deepspeeds_needs_its_launcher(monkeypatch, accelerator):
    writer, compiled = {"checkpoint": {"writer": {}}}, ["deepspeed_shm_comm"]  # of the type FAST, the default
    monkeypatch.delenv("CROSS_SIZE", raising=False)
    (problem,) = problems(writer, compiled)
    assert problem.startswith("checkpoint.writer: needs the variable CROSS_SIZE")
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert problems(writer) == []


def test_a_missing_compiler_matters_where_something_is_to_be_compiled(monkeypatch, accelerator):
    monkeypatch.setenv("PATH", "/nowhere")
    on_cpu, adam = problems(ADAM)
    assert on_cpu.startswith("c++: no C++ compiler found")
    assert adam.startswith("optimizer.params.torch_adam: not set")
    assert "no C++ compiler found; set it to true (torch's AdamW), or install one (Debian: apt-get install g++)" in adam
    assert problems({"optimizer": {"type": "Muon", "params": {}}}) == [on_cpu, adam]  # its other group is Adam's
    assert problems({"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}, ["deepspeed_shm_comm"]) == []
    assert problems(ADAM, ["fused_adam"]) == []


def test_deepspeeds_adam_needs_nvcc_on_a_gpu(monkeypatch, accelerator, tmp_path):
    (tmp_path / "c++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr(accelerator, "device_name", lambda *_: "cuda")
    (problem,) = problems(ADAM, ["deepspeed_shm_comm"])
    assert "no nvcc found; set it to true (torch's AdamW), or install the CUDA toolkit" in problem
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda")
    assert problems(ADAM) == []


@pytest.mark.parametrize(
    ("section", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet-ml")]
)
def test_a_monitor_whose_package_is_missing_is_named(monkeypatch, accelerator, section, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    (problem,) = problems({section: ON}, ["deepspeed_shm_comm"])
    assert problem.startswith(f"{section}.enabled: true, but ")
    assert f"pip install {package}" in problem
    assert problems({section: {"enabled": False}}) == []


def test_too_little_shared_memory_is_said_with_what_is_needed(monkeypatch, accelerator):
    usage = namedtuple("usage", "free")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda *_: usage(4 * SHM_BYTES))
    assert problems({}, ["deepspeed_shm_comm"]) == []
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda *_: usage(64 << 20))  # a container's default
    (problem,) = problems({})
    assert problem.startswith("/dev/shm: 64 MiB free, but DeepSpeed needs 268 MiB for 4 CPU ranks")
    monkeypatch.setenv("LOCAL_SIZE", "2")  # on two nodes DeepSpeed takes none
    assert problems({}) == []


def note_calls(config, save):
    """Prepare pre-training on this rank up to the model, and print the order of what touches a device."""
    import torch

    from seqlen_curriculum import RunConfig
    from seqlen_curriculum.data.from_config import open_run_data
    from seqlen_curriculum.training.pretrain import _Pretraining

    calls = []

    def noted(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append([name, *(arg for arg in args if isinstance(arg, int))])
            return real(*args, **kwargs)

        setattr(owner, name, call)

    noted(type(get_accelerator()), "set_device")
    for name in ("init_process_group", "broadcast_object_list", "all_reduce", "barrier"):
        noted(torch.distributed, name)
    _Pretraining._build = lambda *_: None
    run = RunConfig.load(config)
    _Pretraining(run, *open_run_data(run), machine.Path(save), "auto", None)
    torch.distributed.destroy_process_group()
    print(json.dumps(calls), flush=True)


def test_the_device_is_set_before_the_first_collective(tiny_run, tmp_path):
    require_launches()
    config = tmp_path / "run.json"
    config.write_text(json.dumps(tiny_run))
    with contextlib.ExitStack() as stack:
        started = []
        for rank in (0, 1):
            environment = {**launchers.without_launcher(), **launchers.srun(rank)}
            script = forked(__file__, config, tmp_path / "run", ranks=0)
            started.append(stack.enter_context(running(script, tmp_path / f"log{rank}", env=environment)))
        statuses = [process.wait(limit(300)) for process in started]
    for rank in (0, 1):
        printed = (tmp_path / f"log{rank}").read_text()
        assert statuses[rank] == 0, printed
        first, second, *others = json.loads(next(line for line in printed.splitlines() if line.startswith("[[")))
        assert (first, second) == (["set_device", rank], ["init_process_group"])
        assert ["broadcast_object_list"] in others


if __name__ == "__main__":
    note_calls(*sys.argv[1:])


def test_a_script_without_a_launcher_trains_as_the_only_rank(tmp_path):
    """As in a notebook. DeepSpeed's own ``initialize`` stops here, for want of mpi4py."""
    require_launches()
    if importlib.util.find_spec("mpi4py"):
        pytest.skip("with mpi4py DeepSpeed looks for the ranks of an mpirun")
    log, script = tmp_path / "log", forked("examples/own_loop.py", ranks=0)
    with running(script, log, cwd=tmp_path, env=launchers.without_launcher()) as process:
        assert process.wait(limit(300)) == 0, log.read_text()
    # 8 rows of 672 columns in the ramp of 20 steps, and 64 in each of 19 steps after it
    assert "39 steps, 15104 tokens, last length 64, loss 1." in log.read_text()


@pytest.mark.parametrize(("seq_length", "cudnn"), [(1024, False), (1032, True)])
def test_short_sequences_use_flash_attention_which_has_no_plan_for_each_shape(seq_length, cudnn):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        start.choose_attention(seq_length)
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_idle_devices_are_warned_of(monkeypatch, capsys):
    accelerator = get_accelerator()
    for name, devices, words in (("cuda", 8, "one of 8 devices"), ("cuda", 1, ""), ("cpu", 4, "")):
        monkeypatch.setattr(accelerator, "device_name", lambda *_, name=name: name)
        monkeypatch.setattr(accelerator, "device_count", lambda devices=devices: devices)
        start._warn_of_idle_devices()
        printed = capsys.readouterr().err
        assert words in printed
        assert bool(printed) == bool(words)


@pytest.mark.parametrize("name", ["csv_monitor", "tensorboard"])
def test_a_monitor_that_cannot_write_is_reported_before_the_ranks_connect(tmp_path, name):
    (tmp_path / "file").touch()
    section = {"enabled": True, "output_path": f"{tmp_path}/file/logs"}
    found = [problem for problem in machine_problems({name: section}) if name in problem and "output_path" in problem]
    assert found == [
        f"{name}.output_path: {tmp_path}/file/logs: can't be written to (Not a directory); choose another folder"
    ]
    assert not [
        one for one in machine_problems({name: {**section, "output_path": f"{tmp_path}/logs"}}) if "output_path" in one
    ]
