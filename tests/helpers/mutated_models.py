"""Folders of models and tokenizers with random faults, each a function of its number: values in JSON, bytes, shapes."""

import io
import json
import random
import shutil
import struct
import zipfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers.models import ALIKE, SIZES, complete, save
from helpers.mutated_runs import FRAGMENTS, odd_value
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.models.gpt2 import build_gpt2, save_hf
from seqlen_curriculum.models.pretrained_tokenizer import save_tokenizer

TEXT = (
    "It was the best of times, it was the worst of times. héllo\n  世界 <|endoftext|> it was <0x0A>\u2581\u0120 12345"
)
WORDS = ["float8_e4m3fn", "bfloat16", "gpt2", "llama", "bert", "GPT2LMHeadModel", "T5ForConditionalGeneration", "eager"]
WORDS += [
    "model.safetensors",
    "org/kernel",
    "<unk>",
    "<|endoftext|>",
    "WordPiece",
    "Unigram",
    "BPE",
    "WordLevel",
    "F64",
]
WORDS += ["BF16", "Metaspace", "Whitespace", "Sequence", "relu", "linear", "yarn", "dynamic", "a", "Ġ", " ", "(", "[^"]


def make_bases(root):
    """Save a folder of each kind in ``root``, and return it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TokenizerChoice(train_vocab=300), [TEXT] * 3)
    gpt2, llama = build_gpt2(ModelConfig(**{**SIZES, "vocab_size": 300})), _llama()
    for name in ("gpt2", "checkpoint", "merges", "encoder"):
        save_hf(gpt2, root / name)
    for name in ("llama", "sharded", "zip", "legacy"):
        save(llama, root / name)
    for name in ("gpt2", "checkpoint", "llama"):
        save_tokenizer(tokenizer, root / name, positions=16)
    special = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
    (root / "llama" / "special_tokens_map.json").write_text(json.dumps(special))
    complete(root / "checkpoint", vocab_size=300)
    _save_pair(tokenizer, root / "merges", "vocab.json", "merges.txt")
    _save_pair(tokenizer, root / "encoder", "encoder.json", "vocab.bpe")
    for name in ("zip", "legacy"):
        (root / name / "model.safetensors").unlink()
        torch.save(llama.state_dict(), root / name / "pytorch_model.bin", _use_new_zipfile_serialization=name == "zip")
    (root / "sharded" / "model.safetensors").unlink()
    llama.save_pretrained(root / "sharded", max_shard_size="20KB")
    return root


def _llama():
    settings = {**ALIKE, "vocab_size": 300, "num_hidden_layers": 1, "max_position_embeddings": 16}
    return AutoModelForCausalLM.from_config(LlamaConfig(**settings, eos_token_id=[0, 1]))


def _save_pair(tokenizer, folder, vocab, merges):
    model = json.loads(tokenizer.to_str())["model"]
    (folder / vocab).write_text(json.dumps(model["vocab"], ensure_ascii=False))
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / merges).write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in pairs))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30, "eos_token": "<|endoftext|>"}))


def mutated_folder(number, bases, target):
    """Copy a folder of ``bases`` to the new folder ``target`` with faults in one or two files, which are returned."""
    draw = random.Random(f"folder {number}")
    base = draw.choice(sorted(path.name for path in bases.iterdir()))
    shutil.copytree(bases / base, target)
    names = sorted(path.name for path in target.iterdir() if path.name != "complete.json")
    chosen = draw.sample(names, draw.choice([1, 1, 1, 2]))
    for name in chosen:
        path = target / name
        path.write_bytes(_mutated(draw, name, path.read_bytes()))
    if base == "checkpoint" and draw.random() < 0.9:
        complete(target, vocab_size=300)
    return [base, *chosen]


def _mutated(draw, name, content):
    if draw.random() < 0.3:
        return mutated_bytes(draw, content)
    if name.endswith(".json"):
        return mutated_json(draw, content)
    if name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", content[:8])
        header = mutated_json(draw, content[8 : 8 + length])
        claimed = len(header) if draw.random() < 0.9 else int(draw.choice([0, 1e6, 2**31, 2**63]))
        return struct.pack("<Q", claimed) + header + content[8 + length :]
    if zipfile.is_zipfile(io.BytesIO(content)):
        return _mutated_zip(draw, content)
    return _mutated_lines(draw, content) if name.endswith((".txt", ".bpe")) else mutated_bytes(draw, content)


def mutated_json(draw, content):
    """Return a JSON object with other values, fewer or more keys, or other text."""
    value = json.loads(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        box, key = _place(draw, value)
        change = draw.random()
        if change < 0.6:
            box[key] = _other(draw, box[key])
        elif change < 0.75:
            del box[key]
        elif change < 0.9:
            other, at = _place(draw, value)
            box[key] = json.loads(json.dumps(other[at]))
        elif isinstance(box, dict):
            box[str(draw.choice([*WORDS, "\ud800", ""]))] = _other(draw, 1)
        if not value:
            break
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _place(draw, value):
    """Return (container, key) of a value. Each level is as likely as the next one, however many values that has."""
    box, key = value, draw.choice(list(value))
    while isinstance(box[key], (dict, list)) and box[key] and draw.random() < 0.7:
        box = box[key]
        key = draw.choice(list(box)) if isinstance(box, dict) else draw.randrange(len(box))
    return box, key


def _other(draw, value):
    if type(value) in (int, float) and draw.random() < 0.6:
        half = value / 2 if abs(value) < 1e300 else value
        return draw.choice([value + 1, value - 1, value * 2, value * 1000, 0, -1, 10**7, 10**9, 10**12, half])
    if isinstance(value, bool) and draw.random() < 0.6:
        return not value
    return draw.choice(WORDS) if draw.random() < 0.4 else odd_value(draw)


def _mutated_zip(draw, content):
    """Return torch's zip file with a fault in one of its records, whose checksum is right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = draw.choice([name for name in old.namelist() if name.endswith("data.pkl")] * 3 + old.namelist())
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, mutated_bytes(draw, data) if name == chosen else data)
    return out.getvalue()


def _mutated_lines(draw, content):
    lines = content.decode().split("\n")
    for _ in range(draw.choice([1, 2, 5])):
        at = draw.randrange(len(lines))
        change = draw.choice(["drop", "twice", "swap", "other"])
        if change == "drop" and len(lines) > 1:
            del lines[at]
        elif change == "twice":
            lines.insert(at, lines[at])
        elif change == "swap":
            lines[at] = " ".join(reversed(lines[at].split(" ")))
        else:
            lines[at] = draw.choice(["", " ", "a", "a b c", "Ġ Ġ", "世 界", "x" * 5_000, "a  b", "\ta b", "a b\r"])
    return draw.choice(["\n", "\n", "\r\n"]).join(lines).encode()


def mutated_bytes(draw, content):
    """Return the content with other bits, other bytes, a part less or more, or in another encoding."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(data) + 1)
        change = draw.choice(["bit", "bit", "byte", "cut", "insert", "drop", "repeat", "fragment", "encoding"])
        if change == "bit" and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif change == "byte" and at < len(data):
            data[at] = draw.randrange(256)
        elif change == "cut":
            del data[at:]
        elif change == "insert":
            data[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif change == "drop":
            del data[at : at + draw.randrange(1, 9)]
        elif change == "repeat":
            data[at:at] = data[at : at + draw.choice([1, 100, 10_000])]
        elif change == "fragment":
            data[at:at] = draw.choice(FRAGMENTS).encode()
        elif change == "encoding" and draw.random() < 0.2:
            other = [b"", b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data.decode("latin-1").encode("utf-16")]
            data[:] = draw.choice(other)
    return bytes(data)
