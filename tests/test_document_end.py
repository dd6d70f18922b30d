"""The token that ends documents: tokenizers as published with Llama 3, DeepSeek, Qwen and OPT."""

import json

import pytest
from helpers.models import SIZES, complete
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.document_end import own_end
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.preparation.pieces import Rules
from seqlen_curriculum.data.preparation.prepare import Request, prepare
from seqlen_curriculum.data.tokenizer import TokenizerChoice, read_tokenizer
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.export.huggingface import export
from seqlen_curriculum.models.generation import Sampling, generate
from seqlen_curriculum.models.gpt2 import build_gpt2, save_hf
from seqlen_curriculum.models.pretrained import quiet, set_end_of_text
from seqlen_curriculum.models.pretrained_tokenizer import copy_tokenizer, save_tokenizer

ENDS = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "other": ["<bos>", "<fin>"],
}
BYTES = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(vocab, merges, special):
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def save(folder, kind, eos=None):
    """256 bytes, then the special tokens of ``kind``, so that the first of them is 256."""
    folder.mkdir(exist_ok=True)
    byte_level(BYTES, [], ENDS[kind]).save(str(folder / "tokenizer.json"))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("ab")
    return tmp_path / "text.txt"


def made(tmp_path, text, source, **rules):
    request = Request(str(tmp_path / "corpus"), TokenizerChoice(tokenizer_file=source), [text], workers=1)
    done = prepare(Request(**{**vars(request), "rules": Rules(**rules), "overwrite": True}))
    return done, IndexedCorpus(done.prefix).tokens.tolist()[2:]


@pytest.mark.parametrize(
    ("kind", "eos", "end"),
    [
        ("llama3", "<|end_of_text|>", 257),
        ("llama3", {"content": "<|eot_id|>", "lstrip": False}, 258),
        ("llama3", None, 257),
        ("deepseek", "<｜end▁of▁sentence｜>", 257),
        ("deepseek", None, 257),
        ("qwen", "<|im_end|>", 258),
        ("qwen", None, 256),
        ("qwen", "<absent>", 256),
        ("other", "<fin>", 257),
    ],
)
def test_documents_end_with_the_tokenizers_own_end(tmp_path, text, kind, eos, end):
    folder = save(tmp_path / kind, kind, eos)
    for source in (folder, folder / "tokenizer.json"):
        done, last = made(tmp_path, text, source)
        assert last == [end]
        assert done.record["end_of_text_id"] == end
        assert done.record["vocab_size"] == 256 + len(ENDS[kind])  # no token is added
        assert done.record["settings"]["end_of_text"] == ENDS[kind][end - 256]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("eos", [257, [257, 256]])
def test_the_models_own_end(tmp_path, text, file, eos):
    folder = save(tmp_path / "other", "other")
    (folder / file).write_text(json.dumps({"eos_token_id": eos}))
    assert made(tmp_path, text, folder)[1] == [257]


def test_the_end_is_an_option_and_nothing_is_asked_where_none_is_appended(tmp_path, text):
    folder = save(tmp_path / "other", "other")
    with pytest.raises(ConfigError, match=r"--eod-token, for example '<bos>', '<fin>', or --no-append-eod"):
        made(tmp_path, text, folder)
    assert made(tmp_path, text, folder, eod_token="<fin>")[1] == [257]
    with pytest.raises(ConfigError, match=r"--eod-token '<none>': .* has no such token"):
        made(tmp_path, text, folder, eod_token="<none>")
    done, last = made(tmp_path, text, folder, append_eod=False)
    assert (last, done.record["end_of_text_id"], done.record["settings"]["end_of_text"]) == ([], None, None)
    (folder / "tokenizer_config.json").write_text("[broken")
    with pytest.raises(ConfigError, match="--eod-token"):
        made(tmp_path, text, folder)


def test_opts_files_have_filler_entries(tmp_path, text):
    folder = tmp_path / "opt"
    folder.mkdir()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, *BYTES, "ab", *(f"madeupword{number:04}" for number in range(3))]
    vocab = {token: number for number, token in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nb c\nab c\n")
    with pytest.raises(ConfigError, match="2 tokens without id, such as 'abc'"):
        read_tokenizer(folder)
    for name, number in (("bc", 264), ("abc", 265)):
        vocab[name] = number
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.encode("ab madeupword0000").ids[:1] == [vocab["ab"]]
    assert vocab["madeupword0000"] not in tokenizer.encode("madeupword0000").ids
    done, last = made(tmp_path, text, folder)
    assert IndexedCorpus(done.prefix).tokens.tolist() == [vocab["ab"], 2]  # OPT's </s>
    assert (last, done.record["vocab_size"]) == ([], len(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")  # of another vocabulary, or cut short
    with pytest.raises(ConfigError, match="no merge makes 5 tokens"):
        read_tokenizer(folder)


# Written tokenizers


def config_of(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_a_saved_tokenizer_loads_in_transformers_4_and_has_the_models_limit(tmp_path):
    tokenizer = read_tokenizer(save(tmp_path / "llama3", "llama3"))
    save_tokenizer(tokenizer, tmp_path / "out", "<|end_of_text|>", 32)
    written = config_of(tmp_path / "out")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (written["model_max_length"], written["eos_token"]) == (32, "<|end_of_text|>")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.model_max_length, loaded.eos_token_id) == (32, 257)
    assert len(loaded("a" * 100, truncation=True).input_ids) == 32


def test_a_copied_tokenizer_is_completed(tmp_path):
    source = save(tmp_path / "qwen", "qwen")
    given = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "model_max_length": 1e30}
    given |= {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    given |= {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "chat_template": "kept"}
    (source / "tokenizer_config.json").write_text(json.dumps(given))
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "x"}))
    (tmp_path / "out").mkdir()
    copy_tokenizer(source, tmp_path / "out", "<|endoftext|>", 32)
    assert config_of(tmp_path / "out") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32,
        "eos_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "chat_template": "kept",
    }
    tokens = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert tokens == {"eos_token": "<|endoftext|>", "pad_token": "x"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 256
    (source / "tokenizer_config.json").write_text('{"model_max_length": 16}')  # its author's own limit is kept
    copy_tokenizer(source, tmp_path / "out", None, 32)
    assert config_of(tmp_path / "out") == {"model_max_length": 16}


def test_the_end_of_a_corpus_is_the_end_of_the_model(tmp_path, text):
    done, _ = made(tmp_path, text, save(tmp_path / "llama3", "llama3", "<|eot_id|>"))
    path = tmp_path / "corpus.tokenizer.json"
    tokenizer = read_tokenizer(path)
    assert own_end(path, tokenizer) == "<|eot_id|>"
    model = build_gpt2(ModelConfig(**{**SIZES, "vocab_size": 259}))
    set_end_of_text(model.lm, done.record["end_of_text_id"])
    folder = tmp_path / "run" / "global_step1"
    save_hf(model, folder)
    copy_tokenizer(path, folder, "<|eot_id|>", 16)
    complete(folder, vocab_size=259)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 258
    assert config_of(folder)["model_max_length"] == 16
    export(folder, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 258
    assert config_of(tmp_path / "out")["model_max_length"] == 16
    assert config_of(tmp_path / "out")["tokenizer_class"] == "PreTrainedTokenizerFast"
    # An empty prompt begins as a document does, after the end of another one.
    ((sample,),) = generate(folder, [""], Sampling(max_new_tokens=1, temperature=0))
    assert sample.new_tokens <= 1


def test_an_end_that_the_model_already_has_stays():
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=8, eos_token_id=299))
    with quiet():
        lm.config.eos_token_id = lm.generation_config.eos_token_id = [299, 298]
    set_end_of_text(lm, 298)
    assert lm.config.eos_token_id == lm.generation_config.eos_token_id == [299, 298]
    set_end_of_text(lm, 5)
    assert lm.config.eos_token_id == lm.generation_config.eos_token_id == 5
