"""Compiled blocks of other architectures: few graphs for all lengths, with the losses of uncompiled ones.

The graphs are traced and counted, but run by torch's kernels: a compiler would take a minute.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.fx.experimental._config
from helpers.architectures import ours, tokens
from helpers.settings import changed

from seqlen_curriculum import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.training import abilities
from seqlen_curriculum.training import compile as compiling
from seqlen_curriculum.training.abilities import check_abilities


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trace without compiling, on one rank; return the counters of torch."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compiling.dist, "all_reduce", lambda _missing: None)
    monkeypatch.setattr(compiling, "log_rank0", lambda _line: None)
    shapes, limit = torch.fx.experimental._config.use_duck_shape, torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
    torch.fx.experimental._config.use_duck_shape, torch._dynamo.config.recompile_limit = shapes, limit


# With sliding windows of 8 tokens, rows of up to 8 tokens have graphs of their own, as have multiples of 8.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # from tracing
@pytest.mark.parametrize(("name", "most"), [("llama", 3), pytest.param("mistral", 9, marks=pytest.mark.slow)])
def test_all_lengths_share_a_few_graphs(traced: Any, tiny_run: dict[str, Any], name: str, most: int) -> None:
    model, uncompiled = ours(name), ours(name)
    config = RunConfig.from_dict(changed(tiny_run, training__compile=True))
    assert compiling.compile_model(config, model, torch.device("cpu"))
    for seqlen in (24, 7, 33):
        for rows in (3, 1):
            loss = model.train()(*tokens(rows, seqlen))
            loss.backward()
            assert loss.item() == uncompiled(*tokens(rows, seqlen)).item()
        with torch.no_grad():
            model.eval()(*tokens(4, seqlen))
    assert not traced["graph_break"]
    assert 1 <= traced["stats"]["unique_graphs"] - 1 <= most  # one is the check for a compiler


def test_compiled_blocks_need_our_attention_and_no_recorded_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "log_rank0", lambda _line: None)
    check_abilities(ours("llama"), "truncate", compiled=True)
    check_abilities(ours("mixtral", output_router_logits=False), "truncate", compiled=True)
    with pytest.raises(ConfigError, match=r"training.compile: true doesn't work with a bloom"):
        check_abilities(ours("bloom"), "truncate", compiled=True)
    with pytest.raises(ConfigError, match=r"training.compile: true .*mixtral.*output_router_logits"):
        check_abilities(ours("mixtral"), "truncate", compiled=True)
    with pytest.raises(ConfigError, match=r'method: "window" doesn\'t work with a mpt'):
        check_abilities(ours("mpt"), "window", compiled=None)
