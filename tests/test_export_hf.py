"""A checkpoint as a Hugging Face folder, the text that a model writes, and the examples in the help of both commands."""

import contextlib
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys

import pytest
import torch
from helpers.launching import ROOT
from helpers.models import SIZES, complete
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, GenerationConfig
from transformers.utils import logging

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.export.huggingface import export
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.models.generation import Sampling, generate
from seqlen_curriculum.models.gpt2 import build_gpt2, save_hf
from seqlen_curriculum.models.pretrained import load_model, quiet
from seqlen_curriculum.models.pretrained_tokenizer import save_tokenizer

END = 0
"""The id of the end of text in a tokenizer trained by this package."""
SETTINGS = {
    "model.vocab_size": 257,
    "curriculum_learning.enabled": True,
    "curriculum_learning.min_difficulty": 4,
    "curriculum_learning.max_difficulty": 16,
    "optimizer.params.lr": 0.01,
    "training.train_tokens": 128,
    "training.seqlen_bucket": None,
    "data.train.0": "0123456789abcdef",
}


@pytest.fixture(scope="module", autouse=True)
def _loud():
    """transformers says all it has to say, so that what is kept off the terminal is kept off by this package."""
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 6 steps of 2 rows, of which the checkpoint of step 610 (the newest) is step 4's as far as its log goes."""
    save = tmp_path_factory.mktemp("runs") / "tiny"
    folder = save / "global_step610"
    torch.manual_seed(0)
    save_hf(build_gpt2(ModelConfig(**SIZES)), folder)
    save_tokenizer(build_tokenizer(TokenizerChoice(train_vocab=257), []), folder)
    complete(folder, step=610)
    manifest = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps({**manifest, "run": SETTINGS}))
    step = {"seqlen": 8, "rows": 2, "lr": 0.01, "grad_norm": 1.0, "seconds": 0.1}
    records = [
        {"step": 609, "consumed_tokens": 1600, "loss": 5.5, **step},
        {"step": 610, "consumed_tokens": 1616, "loss": 5.4, **step},
        {"step": 610, "consumed_tokens": 1616, "valid_loss": 5.25, "valid_ppl": 190.566, "seconds": 0.1},
        {"step": 611, "consumed_tokens": 1632, "loss": 5.3, **step},
        {"step": 611, "consumed_tokens": 1632, "valid_loss": 5.125, "valid_ppl": 168.174, "seconds": 0.1},
    ]
    (save / "runlog.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    launch = {"started": "2024-01-01T00:00:00+00:00", "ranks": 1, "first_step": 1, "device": {}}
    launch["versions"] = {"torch": "2.13.0", "deepspeed": "0.19.8"}
    (save / "run.json").write_text(json.dumps({"config": {}, "launches": [launch]}))
    return save


TOKENS = torch.arange(12).reshape(1, 12) * 20


def test_the_way_out_and_in_again(run, tmp_path, capfd):
    """Checkpoint, Hugging Face folder, training again: the same model each time."""
    assert export(run, tmp_path / "out") == run / "global_step610"
    checkpoint, exported = load_model(run), load_model(tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    files = {"README.md", "config.json", "curves.png", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, "tokenizer.json", "tokenizer_config.json"}
    expected = checkpoint(TOKENS).logits
    torch.testing.assert_close(exported(TOKENS).logits, expected, atol=1e-5, rtol=0)
    again = build_model(ModelConfig.model_validate({"hf_checkpoint": str(tmp_path / "out")})).eval()
    logits = again.lm(TOKENS).logits
    assert logits.shape[-1] == 384
    torch.testing.assert_close(logits[..., :257], expected, atol=1e-5, rtol=0)
    # 127 rows of the mean of 257 take at most 127 / 257 of the others' sum.
    rise = (logits.logsumexp(-1) - expected.logsumexp(-1)).detach()
    assert 0 < rise.min() <= rise.max() <= math.log(1 + 127 / 257)


def test_without_padding_the_loss_stays(tmp_path):
    torch.manual_seed(0)
    model = build_gpt2(ModelConfig(**{**SIZES, "vocab_size": 256}))
    save_hf(model, tmp_path / "global_step1")
    export(complete(tmp_path / "global_step1", vocab_size=256), tmp_path / "out")
    again = build_model(ModelConfig.model_validate({"hf_checkpoint": str(tmp_path / "out")}))
    with torch.no_grad():
        assert float(again(TOKENS, TOKENS)) == pytest.approx(float(model(TOKENS, TOKENS)), abs=1e-5)


def test_the_folder_is_ready_to_generate(run, tmp_path):
    export(run, tmp_path / "out", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["vocab_size"], config["use_cache"], config["eos_token_id"], config["bos_token_id"]) == (
        257,
        True,
        END,
        END,
    )
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == END
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == END
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_all_files_are_on_disk_before_the_folder_has_its_name(run, tmp_path, monkeypatch):
    fsync, replace, calls = os.fsync, os.replace, []
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    export(run, tmp_path / "out")
    flushed = {os.path.basename(path) for path in calls[: len(calls) - calls[::-1].index("rename") - 1]}
    assert flushed >= {path.name for path in (tmp_path / "out").iterdir()} | {".out.tmp"}
    assert calls[-1] == str(tmp_path)


def test_weights_that_float16_does_not_hold_are_refused(run, tmp_path):
    model = load_model(run)
    bias = model.transformer.h[0].mlp.c_fc.bias.detach()
    bias[3] = -65_519  # rounds to -65,504
    model.save_pretrained(tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "fits", dtype="float16")
    bias[3] = -65_520  # rounds to minus infinity
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"--dtype float16: transformer\.h\.0\.mlp\.c_fc\.bias in .* give bfloat16"):
        export(tmp_path / "hf", tmp_path / "out", dtype="float16")
    export(tmp_path / "hf", tmp_path / "out", dtype="bfloat16")


def test_the_card_describes_the_checkpoint_and_its_run(run, tmp_path):
    export(run, tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- gpt2\n- sequence-l"
    )
    assert "license" not in card
    # 257 words and 16 positions of 16, one block of 12 * 256 + 13 * 16, the last norm
    assert "# mine\n\nA `GPT2LMHeadModel` of 7,680 parameters in float32: `num_layers` 1, `hidden_size` 16" in card
    assert "whose schedule goes from 4 to 16 tokens" in card  # the log begins with step 609
    for row in (
        "| steps | 610 |",
        "| tokens | 1,616 |",
        "| validation loss at step 610 | 5.250 (perplexity 190.6) |",
        "| `optimizer.params.lr` | `0.01` |",
        "| deepspeed | 0.19.8 |",
    ):
        assert row in card
    assert "5.125" not in card  # a later step's
    assert not re.search("seqlen_bucket|0123456789abcdef|vocab_size`? \\|", card)
    assert "](curves.png)" in card
    assert (tmp_path / "mine" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_its_log_or_its_run_the_card_says_less(run, tmp_path):
    alone = shutil.copytree(run / "global_step610", tmp_path / "alone" / "global_step610")
    export(alone, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 610 |" in card
    assert not re.search("curves|tokens \\||validation|deepspeed", card)
    (tmp_path / "alone" / "runlog.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1 is not a run log record"):
        export(alone, tmp_path / "other")
    export(tmp_path / "out", tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "## Training" not in card
    assert "of 7,680 parameters" in card


def test_lengths_are_those_that_were_read(run, tmp_path):
    """Of 4 to 16 by the schedule, step 610 had come to 12; what comes after it is another checkpoint's."""
    save = shutil.copytree(run, tmp_path / "run")
    step = {"consumed_tokens": 8, "loss": 5.5, "rows": 2, "lr": 0.01, "grad_norm": 1.0, "seconds": 0.1}
    lengths = {1: 4, 2: 12, 610: 12, 611: 16}
    records = [{"step": number, "seqlen": seqlen, **step} for number, seqlen in lengths.items()]
    (save / "runlog.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    export(save, tmp_path / "out")
    assert "on sequences of 4 to 12 tokens" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_loads_a_folder_of_any_name(run, tmp_path):
    out = tmp_path / 'the "best" model\'s\nname'
    export(run, out)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert f"AutoTokenizer.from_pretrained({out.name!r})" in code


def test_nothing_is_overwritten_and_nothing_is_left_half(run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "full", tmp_path / "full" / "notes"):
        with pytest.raises(ConfigError, match=r"--out .* exists and is not empty"):
            export(run, out)
    export(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").exists()
    (tmp_path / ".out.tmp").mkdir()  # left by a kill
    (tmp_path / ".out.tmp" / "stale").touch()
    export(run, tmp_path / "out")
    assert not (tmp_path / "out" / "stale").exists()
    with pytest.raises(CheckpointError, match=r"--out .*notes/deep: can't be written"):
        export(run, tmp_path / "full" / "notes" / "deep")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        export(tmp_path / "nothing", tmp_path / "out2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "out"]


def new_text(run, prompt, **how):
    ((sample,),) = generate(run, [prompt], Sampling(**{"max_new_tokens": 5, "temperature": 0, **how}))
    return sample


def test_greedy_text_is_the_arithmetic_of_the_logits(run):
    model, tokenizer = load_model(run), AutoTokenizer.from_pretrained(run / "global_step610")
    ids = tokenizer("abc").input_ids
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert END not in ids
    assert new_text(run, "abc") == (tokenizer.decode(ids), 5, False)
    assert new_text(run, "abc", temperature=1.0, top_k=1) == new_text(run, "abc")
    assert new_text(run, "abc", temperature=1.0, top_p=1e-6) == new_text(run, "abc")


def test_it_stops_at_the_end_of_text(run, tmp_path):
    model = load_model(run)
    with torch.no_grad():  # whatever came before, the end of text has the largest logit by far
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[END] * 1e4)
    with quiet():
        model.save_pretrained(tmp_path)
    save_tokenizer(build_tokenizer(TokenizerChoice(train_vocab=257), []), tmp_path)
    assert new_text(tmp_path, "abc", max_new_tokens=100) == ("abc", 0, False)


def test_settings_saved_with_a_model_change_nothing(run, tmp_path):
    export(run, tmp_path / "out")
    settings = {"repetition_penalty": 50.0, "max_length": 3, "num_beams": 2, "output_hidden_states": "a"}
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps(settings))
    assert new_text(tmp_path / "out", "aa") == new_text(run, "aa")


def test_samples_follow_from_the_seed(run):
    def drawn(seed, prompts=("a",)):
        sampling = Sampling(max_new_tokens=8, temperature=2.0, samples=3, seed=seed)
        return [[sample.text for sample in samples] for samples in generate(run, prompts, sampling)]

    (first,) = drawn(1)
    assert len(set(first)) == 3
    assert drawn(1) == [first]
    assert drawn(1, ("b", "a"))[1] == first
    assert drawn(2) != [first]


def test_the_models_positions_are_the_limit(run, tmp_path):
    assert new_text(run, "a" * 12, max_new_tokens=4)[1:] == (4, False)
    assert new_text(run, "a" * 12, max_new_tokens=5)[1:] == (4, True)
    with pytest.raises(ConfigError, match="is 16 tokens long, but the model has 16 positions"):
        new_text(run, "a" * 16)
    torch.manual_seed(0)
    config = BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=257, eos_token_id=None, bos_token_id=None)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(build_tokenizer(TokenizerChoice(train_vocab=257), []), tmp_path)
    assert new_text(tmp_path, "a" * 16).full is False  # has no last position


def test_values_that_make_no_sense_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        Sampling(max_new_tokens=0, temperature=-1, top_p=0, top_k=-1, samples=0, seed=-1)
    flags = ["--max-new-tokens: 0", "--temperature: -1", "--top-p: 0", "--top-k: -1", "--samples: 0", "--seed: -1"]
    assert [problem.partition(" is")[0] for problem in caught.value.problems] == flags
    with pytest.raises(ConfigError, match="--samples: 2 would all be the same"):
        Sampling(temperature=0, samples=2)


def run_script(monkeypatch, name, arguments, stdin=None):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    if stdin is not None:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


@pytest.mark.parametrize("name", ["export_hf.py", "generate.py"])
def test_the_examples_in_the_help_work(name, run, tmp_path, monkeypatch, capfd):
    shutil.copytree(run, tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    run_script(monkeypatch, name, ["--help"])
    lines = [line.strip() for line in capfd.readouterr().out.split("Example:")[1].splitlines() if "slw" in line]
    assert len(lines) == 2
    for line in lines:
        echoed, pipe, command = line.rpartition(" | ")
        words = shlex.split(command)
        assert words[:2] == ["slw", name.removesuffix(".py").removesuffix("_hf")]
        run_script(monkeypatch, name, words[2:], echoed[5:] if pipe else None)
        out, error = capfd.readouterr()
        assert not re.search("error|Traceback|transformers", error), error
        assert ("def main(" in out) if name == "generate.py" else (tmp_path / words[words.index("--out") + 1]).is_dir()


def test_results_as_json(run, tmp_path, monkeypatch, capfd):
    run_script(monkeypatch, "generate.py", [run, "--prompt", "a", "--prompt", "b", "--max-new-tokens", "3", "--json"])
    samples = json.loads(capfd.readouterr().out)["samples"]
    assert [(sample["prompt"], sample["text"][0], sample["new_tokens"]) for sample in samples] == [
        ("a", "a", 3),
        ("b", "b", 3),
    ]
    run_script(monkeypatch, "export_hf.py", [run, "--out", tmp_path / "out", "--json"])
    exported = {"checkpoint": str(run / "global_step610"), "out": str(tmp_path / "out")}
    assert json.loads(capfd.readouterr().out) == exported


def test_prompts_are_utf8(run, monkeypatch, capfd):
    run_script(monkeypatch, "generate.py", [run, "--max-new-tokens", "1"], "Größe\r\n")
    assert capfd.readouterr().out.startswith("Größe")
    run_script(monkeypatch, "generate.py", [run], b"Fellow \xff\xfe")
    message = "error: --prompt 'Fellow \\udcff\\udcfe': is not UTF-8 at character 8; give it, or stdin, in UTF-8\n"
    assert capfd.readouterr() == ("", message)
    run_script(monkeypatch, "generate.py", [run, "--prompt", "a", "--prompt", "Fellow \udcff\udcfe"])
    assert capfd.readouterr() == ("", message)


def test_mistakes_are_reported_in_a_line(run, tmp_path, monkeypatch, capfd):
    for name, arguments, words in (
        ("generate.py", [tmp_path / "nothing", "--prompt", "a"], "nothing: there is no such folder"),
        ("generate.py", [run, "--prompt", "a", "--top-p", "2"], "--top-p: 2.0 is not valid"),
        ("generate.py", [run, "--prompt", "a" * 30], "is 30 tokens long"),
        ("export_hf.py", [run, "--out", run], "exists and is not empty"),
        ("export_hf.py", [tmp_path / "nothing", "--out", tmp_path / "out"], "nothing: there is no such folder"),
        ("export_hf.py", [run, "--out", "/proc/folder"], "--out /proc: can't be written to"),
    ):
        run_script(monkeypatch, name, arguments)
        out, error = capfd.readouterr()
        assert out == ""
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1
