"""A run folder that somebody else made runs no code, and no file outside it is read or written, by any command."""

import contextlib
import json
import os
import shutil
import signal

import pytest
import torch
from helpers.command import slw
from helpers.launching import limit
from helpers.models import SIZES, complete
from helpers.settings import block

from seqlen_curriculum import RunConfig
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.errors import SeqlenCurriculumError
from seqlen_curriculum.files import lock_folder, replace_text
from seqlen_curriculum.models.gpt2 import build_gpt2, save_hf
from seqlen_curriculum.models.pretrained_tokenizer import save_tokenizer
from seqlen_curriculum.run_folder.run_log import RunLog
from seqlen_curriculum.training import checkpoint as checkpoints
from seqlen_curriculum.training.pretrain import refuse_other_run
from seqlen_curriculum.training.read_shard import read_shard
from seqlen_curriculum.training.run_info import record_launch

SECRET = "the-secret-of-this-user"
EVIL = """
import os, pathlib
def run(step=0):
    pathlib.Path(os.environ["CANARY"]).write_text("ran")
    return 8
run()
"""
FILE = {
    "train_batch_size": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "curriculum_learning": {**block(max_difficulty=16), "schedule_config": {"total_curriculum_step": 4}},
    "model": SIZES,
    "data": {"train": ["corpus/texts"], "seq_length": 16},
    "training": {"train_tokens": 128},
}
FILE["curriculum_learning"]["schedule_config"]["difficulty_step"] = 8
CUSTOM = {**FILE["curriculum_learning"], "schedule_type": "custom", "schedule_config": {"function": "evil:run"}}


class Pickled:
    """An object whose pickle imports and calls ``evil.run``."""

    def __reduce__(self):
        import evil

        return evil.run, ()


@pytest.fixture(scope="module")
def innocent(tmp_path_factory):
    """A run of one checkpoint with a model, a tokenizer, a shard, a log and a record."""
    save = tmp_path_factory.mktemp("innocent") / "run"
    folder = save / "global_step2"
    torch.manual_seed(0)
    save_hf(build_gpt2(ModelConfig(**SIZES)), folder)
    save_tokenizer(build_tokenizer(TokenizerChoice(train_vocab=257), []), folder)
    torch.save({"module": {}}, folder / "mp_rank_00_model_states.pt")
    seal(folder)
    step = {"seqlen": 8, "rows": 2, "lr": 0.01, "grad_norm": 1.0, "seconds": 0.1}
    records = [{"step": number, "consumed_tokens": 16 * number, "loss": 5.0, **step} for number in (1, 2, 3)]
    (save / "runlog.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_info(save)
    return save


def seal(folder, **changes):
    """Write the manifest anew, with the settings of the run and ``changes``."""
    complete(folder, step=2)
    manifest = json.loads((folder / "complete.json").read_text())
    settings = {**RunConfig.from_dict(FILE).settings(), "model.vocab_size": 257}
    (folder / "complete.json").write_text(json.dumps({**manifest, "run": settings, **changes}))


def write_info(save, versions=None, **config):
    launch = {"started": "2024-01-01T00:00:00+00:00", "ranks": 1, "first_step": 1, "device": {}}
    launch["versions"] = versions or {"torch": "2.13.0"}
    (save / "run.json").write_text(json.dumps({"config": {**FILE, **config}, "launches": [launch]}))


def files_and(folder, **more):
    return {**json.loads((folder / "complete.json").read_text())["files"], **more}


def link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def function_in_the_record(save, _outside):
    write_info(save, curriculum_learning=CUSTOM)


def function_in_the_manifest(save, _outside):
    settings = {**RunConfig.from_dict(FILE).settings(), "curriculum_learning.schedule_config.function": "evil:run"}
    seal(save / "global_step2", run={**settings, "curriculum_learning.schedule_type": "custom"})


def function_nested_in_the_manifest(save, _outside):
    settings = RunConfig.from_dict(FILE).settings()
    settings = {key: value for key, value in settings.items() if not key.startswith("curriculum_learning")}
    seal(save / "global_step2", run={**settings, "curriculum_learning": CUSTOM})


def code_in_a_shard(save, _outside):
    folder = save / "global_step2"
    torch.save({"module": Pickled()}, folder / "mp_rank_00_model_states.pt")
    seal(folder)


def a_climbing_name(save, outside):
    name = os.path.relpath(outside / "secret.txt", save / "global_step2")
    seal(save / "global_step2", files=files_and(save / "global_step2", **{name: len(SECRET)}))


def an_absolute_name(save, outside):
    name = str(outside / "secret.txt")
    seal(save / "global_step2", files=files_and(save / "global_step2", **{name: len(SECRET)}), crc32={name: 0})


def a_name_with_nul(save, _outside):
    seal(save / "global_step2", files=files_and(save / "global_step2", **{"a\0b": 1}))


def a_name_of_5000_letters(save, _outside):
    seal(save / "global_step2", files=files_and(save / "global_step2", **{"a" * 5000: 1}))


def linked_weights(save, outside):
    shutil.copy(save / "global_step2" / "model.safetensors", outside / "model.safetensors")
    link(save / "global_step2" / "model.safetensors", outside / "model.safetensors")


def linked_manifest(save, outside):
    link(save / "global_step2" / "complete.json", outside / "secret.txt")


def linked_log(save, outside):
    link(save / "runlog.jsonl", outside / "secret.txt")


def linked_sample_log(save, outside):
    link(save / "samples.rank0.jsonl", outside / "secret.txt")


def linked_record(save, outside):
    link(save / "run.json", outside / "secret.txt")


def linked_ledger(save, outside):
    link(save / "rollbacks.json", outside / "secret.txt")


def linked_latest(save, outside):
    link(save / "latest", outside / "secret.txt")
    link(save / f".latest.{os.getpid()}.tmp", outside / "secret.txt")


def linked_lock(save, outside):
    link(save / ".lock", outside / "secret.txt")


def linked_tokenizer_files(save, outside):
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        link(save / "global_step2" / name, outside / "secret.txt")


def linked_unfinished_checkpoint(save, outside):
    link(save / ".global_step2.tmp", outside)
    link(save / ".global_step3.tmp", outside / "secret.txt")


def linked_checkpoint(save, outside):
    (save / "global_step2").rename(outside / "global_step2")
    (save / "global_step2").symlink_to(outside / "global_step2")


def a_tokenizer_that_panics(save, _outside):
    path = save / "global_step2" / "tokenizer.json"
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": normalizer}))
    seal(save / "global_step2")


def a_pipe_as_log(save, _outside):
    (save / "runlog.jsonl").unlink()
    os.mkfifo(save / "runlog.jsonl")


def a_device_as_record(save, _outside):
    link(save / "run.json", "/dev/zero")


def markup(save, _outside):
    text = f"1\n\n<script>alert(1)</script> ](javascript:x) | {'`' * 3}\n# head"
    write_info(save, versions={text: text}, gradient_clipping=text)
    settings = {**RunConfig.from_dict(FILE).settings(), "model.vocab_size": 257}
    seal(save / "global_step2", run={**settings, f"training.{text}": text, "data.leftovers": text})


ATTACKS = {
    function_in_the_record: "'evil:run' is a function that this command would import and run",
    function_in_the_manifest: "'evil:run' in the checkpoint, None now",
    function_nested_in_the_manifest: "made by another run",
    code_in_a_shard: "not loaded, because it contains evil.run",
    a_climbing_name: "outside/secret.txt' leads out of the folder",
    an_absolute_name: "' leads out of the folder",
    a_name_with_nul: "has a NUL character",
    a_name_of_5000_letters: "aaaaaa' is not the name of a file",
    linked_weights: "model.safetensors is a link to",
    linked_manifest: "complete.json is a link to",
    linked_log: "runlog.jsonl: is a link to",
    linked_sample_log: "samples.rank0.jsonl: is a link to",
    linked_record: "run.json: is a link to",
    linked_ledger: "rollbacks.json: is a link to",
    linked_latest: "",
    linked_lock: ".lock: is a link",
    linked_tokenizer_files: "is a link to",
    linked_unfinished_checkpoint: "",
    linked_checkpoint: "give that folder to export it",
    a_tokenizer_that_panics: "not a tokenizer.json (Precompiled",
    a_pipe_as_log: "is not a regular file",
    a_device_as_record: "is a link to /dev/zero",
    markup: "data.leftovers: '1\\n\\n<script>",
}
"""Each attack, and a part of the message of the command that finds it; "" if the link is replaced, not followed."""


def resume(save):
    """What rank 0 does with the folder in ``slw train --save SAVE``, without the engine; return the message of its error."""
    run = checkpoints.Checkpoints(
        save, keep_last=1, run={**RunConfig.from_dict(FILE).settings(), "model.vocab_size": 257}
    )
    try:
        lock_folder(save, "--save", "training into it")
        checkpoint = run.find("auto")
        refuse_other_run(save, "auto", checkpoint)
        record_launch(save, {}, 1, 3)
        for path in (save / "runlog.jsonl", *save.glob("samples.rank*.jsonl")):
            RunLog.rewind(path, 2)
        log = RunLog(save / "runlog.jsonl")
        log.write({"step": 3})
        log.close()
        for path in checkpoint.folder.glob("*.pt") if checkpoint else ():
            read_shard(path)
        run._delete_hidden()
        replace_text(save / "latest", "global_step2")
        if checkpoint:
            shutil.copytree(checkpoint.folder, save / "global_step3", symlinks=True)
            run.drop_old()  # keeps one
    except SeqlenCurriculumError as error:
        return str(error)
    return ""


def lambada(folder):
    """Return a task of one item for evaluate."""
    (folder / "lambada.jsonl").write_text('{"text": "a b"}\n')
    return f"lambada={folder / 'lambada.jsonl'}"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def one_process(monkeypatch):
    """The checkpoints of one process, without torch's process group."""
    monkeypatch.setattr(checkpoints, "on_rank_0", lambda function: function())
    monkeypatch.setattr(checkpoints, "on_all_ranks", lambda function: [function()])
    monkeypatch.setattr(checkpoints, "log_rank0", print)
    monkeypatch.setattr(checkpoints.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoints.dist, "get_world_size", lambda: 1)


@contextlib.contextmanager
def time_limit():
    """Fail if the block takes a minute on an idle machine, as it would with an endless file."""

    def fail(_signal, _frame):
        raise AssertionError("still reading after a minute")

    handler = signal.signal(signal.SIGALRM, fail)
    signal.alarm(int(limit(60)))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_strangers_folder_runs_nothing_and_takes_nothing(innocent, tmp_path, monkeypatch, capsys, attack):
    outside, save = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    canary = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(canary))
    shutil.copytree(innocent, save)
    attack(save, outside)
    monkeypatch.delitem(__import__("sys").modules, "evil", raising=False)
    canary.unlink(missing_ok=True)
    before, task = contents(outside), lambada(tmp_path)
    with time_limit():
        results = [
            slw("report", save, *(["--out", tmp_path / "report"] if attack is markup else ["--json"])),
            slw("inspect", save),
            slw("export", save, "--out", tmp_path / "exported"),
            slw("generate", save, "--prompt", "a", "--max-new-tokens", 2),
            slw("evaluate", save, "--task", task),
        ]
        problem = resume(save)
    assert not canary.exists()
    assert contents(outside) == before
    assert all(result.returncode in (0, 1) for result in results)
    assert all(result.stderr.count("error: ") == result.returncode for result in results)
    printed = "".join(result.stdout + result.stderr for result in results) + problem + capsys.readouterr().out
    made = b"".join(path.read_bytes() for name in ("report", "exported") for path in (tmp_path / name).rglob("*.*"))
    assert SECRET not in printed
    assert ATTACKS[attack] in printed
    assert ATTACKS[attack] or problem == ""
    assert SECRET.encode() not in made
    if attack is markup:
        card, page = (
            (tmp_path / "exported" / "README.md").read_text(),
            (tmp_path / "report" / "report.html").read_text(),
        )
        assert "<script>alert" not in card + page
        assert not [line for line in card.splitlines() if line.startswith("# ")][1:]
        assert "](javascript" not in card


@pytest.mark.usefixtures("one_process")
def test_the_folder_without_an_attack_works_in_every_command(innocent, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(innocent, save)
    assert slw("report", save, "--out", tmp_path / "report").returncode == 0
    assert slw("export", save, "--out", tmp_path / "exported").returncode == 0
    assert slw("generate", save, "--prompt", "a", "--max-new-tokens", 2).returncode == 0
    assert slw("evaluate", save, "--task", lambada(tmp_path)).returncode == 0
    assert resume(save) == ""


def test_a_function_is_run_if_the_user_gives_the_file_that_names_it(innocent, tmp_path, monkeypatch):
    save = tmp_path / "run"
    shutil.copytree(innocent, save)
    (tmp_path / "mine.py").write_text("def lengths(step):\n    return 8 * step\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    custom = {**CUSTOM, "schedule_config": {"function": "mine:lengths", "difficulty_step": 8}}
    write_info(save, curriculum_learning=custom)
    refused = slw("plan", save)
    assert refused.returncode == 1
    assert "curriculum_learning.schedule_config.function: 'mine:lengths' is a function" in refused.stderr
    assert f"give {save}/run.json itself" in refused.stderr
    assert slw("plan", save / "run.json").returncode == 0
