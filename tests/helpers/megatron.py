"""Megatron's batches and arguments, and its GPTModel, schedules and learning rate on CPU ranks.

Megatron asks CUDA for the current device, for some tensors and for the random state. ``parallel`` replaces these calls.
"""

import argparse
import contextlib
import copy
import runpy
import warnings

import torch
from torch.overrides import TorchFunctionMode

from helpers.launching import ROOT
from seqlen_curriculum.integrations.megatron import cut_tensors

FULL, VOCAB, BATCH, MICRO_BATCHES, LR = 32, 256, 8, 2, 0.5


def megatron_args(**changes):
    """The arguments of Megatron that the integration reads."""
    defaults = {
        "rank": 0,
        "global_batch_size": BATCH,
        "lr": LR,
        "seq_length": FULL,
        "train_iters": 1,
        "train_samples": None,
        "rampup_batch_size": None,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "context_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "variable_seq_lengths": False,
        "moe_token_dispatcher_type": "alltoall",
    }
    return argparse.Namespace(**{**defaults, **changes})


def batch_of(rows=2, seqlen=FULL, **changes):
    """A batch of Megatron's ``get_batch_on_this_tp_rank``: row r counts up from r."""
    tokens = torch.arange(rows)[:, None] + torch.arange(seqlen + 1)
    batch = {
        "attention_mask": torch.ones(rows, 1, seqlen, seqlen, dtype=torch.bool).triu(1),
        "cu_seqlens": None,
        "cu_seqlens_padded": None,
        "labels": tokens[:, 1:].contiguous(),
        "local_cp_size": None,
        "loss_mask": torch.ones(rows, seqlen),
        "max_seqlen": None,
        "position_ids": torch.arange(seqlen).expand(rows, -1),
        "tokens": tokens[:, :-1].contiguous(),
    }
    return {**batch, **changes}


class OnCPU(TorchFunctionMode):
    """Makes tensors that are asked for on CUDA on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **({**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


@contextlib.contextmanager
def parallel(tp=1, pp=1, cp=1):
    """Set up Megatron's process groups of two ranks on a CPU."""
    with warnings.catch_warnings(action="ignore"):  # Apex and Transformer Engine are missing
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        torch.cuda.current_device, torch.cuda.synchronize = lambda: "cpu", lambda: None
        CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
        parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
        with OnCPU():
            yield parallel_state
        parallel_state.destroy_model_parallel()


def gpt(tp=1, pp=1, first=True, last=True):
    """Return a GPTModel of two layers, or one of two stages of it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    off = dict.fromkeys(["gradient_accumulation_fusion", "bias_dropout_fusion", "masked_softmax_fusion"], False)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        hidden_dropout=0,
        attention_dropout=0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=pp > 1,
        moe_token_dispatcher_type="alltoall",
        **off,
    )
    torch.manual_seed(0)
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        VOCAB,
        FULL,
        share_embeddings_and_output_weights=False,
        pre_process=first,
        post_process=last,
    )


def losses_of(model, batch):
    """Return the loss of each token, (B, S)."""
    return model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])


def cut_rows(tp):
    """Compare cut rows with short rows, and with the first tokens of full rows, under tensor parallelism."""
    with parallel(tp=tp), torch.no_grad():
        model = gpt(tp=tp)
        full, seen = losses_of(model, batch_of()), {}
        for seqlen in (8, 16, 30):
            cut = losses_of(model, cut_tensors(batch_of(), seqlen))
            short = losses_of(model, batch_of(seqlen=seqlen))
            seen[seqlen] = torch.equal(cut, short), (cut - full[:, :seqlen]).abs().max().item(), list(cut.shape)
    return seen


def sliced():
    """Return the tokens that the ranks of a context-parallel group get of a cut row, in the row's order."""
    with parallel(cp=2):
        from megatron.core.utils import get_batch_on_this_cp_rank

        cut = cut_tensors(batch_of(rows=1, attention_mask=None), 8, cp=2)
        own = get_batch_on_this_cp_rank(cut)["tokens"].contiguous()
        first, second = torch.empty_like(own), torch.empty_like(own)
        torch.distributed.all_gather([first, second], own)
        return torch.cat([first[:, :2], second, first[:, 2:]], 1).tolist()  # rank 0 has chunks 0 and 3 of four


class Training:
    """A run of Megatron's schedules as in a ``pretrain_gpt.py`` with the functions of ``examples/megatron_lm.py``."""

    def __init__(self, run, pp, state):
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        self.args = megatron_args(pipeline_model_parallel_size=pp)
        self.recipe = runpy.run_path(str(ROOT / "examples" / "megatron_lm.py"))
        self.plan = self.recipe["plan_run"](self.args, run)
        self.model = stage(pp, state.get_pipeline_model_parallel_rank())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.lr, momentum=0.9)
        samples = self.plan.steps * BATCH
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=self.args.lr,
            min_lr=0.0,
            lr_warmup_steps=0,
            lr_decay_steps=samples,
            lr_decay_style="cosine",
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=samples,
            wd_incr_style="constant",
        )
        self.seen = {"losses": [], "rates": [], "lengths": [], "evaluated": [], "tokens": []}

    def forward_step(self, batches, model):
        batch = self.recipe["cut_batch"](next(batches), self.args, self.plan)
        self.seen["lengths" if torch.is_grad_enabled() else "evaluated"].append(batch["tokens"].shape[1])
        return losses_of(model, batch), lambda losses: (losses.mean(), {"loss": losses.mean().item()})

    def run_batch(self, step, **options):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        sizes = {"num_microbatches": MICRO_BATCHES, "micro_batch_size": BATCH // MICRO_BATCHES, "seq_length": FULL}
        run = get_forward_backward_func()
        outputs = run(
            forward_step_func=self.forward_step, data_iterator=rows_of(step), model=self.model, **sizes, **options
        )
        return sum(output["loss"] for output in outputs) / MICRO_BATCHES

    def step(self, step):
        self.args.curr_iteration = step - 1
        self.optimizer.zero_grad()
        self.seen["rates"].append(self.optimizer.param_groups[0]["lr"])
        self.seen["losses"].append(self.run_batch(step))
        self.seen["tokens"].append(self.args.consumed_train_tokens)
        self.optimizer.step()
        self.scheduler.step(BATCH)
        if step % 8 == 0:
            with torch.no_grad():
                self.run_batch(step, forward_only=True)

    def parts(self):
        return self.model, self.optimizer, self.scheduler


def stage(pp, rank):
    """Return the whole model, or the stage of ``rank`` with its weights of the whole model."""
    whole = gpt()
    if pp == 1:
        return whole
    own, weights = gpt(pp=pp, first=rank == 0, last=rank == 1), dict(whole.named_parameters())
    for name, parameter in own.named_parameters():
        parameter.data.copy_(weights[name.replace("layers.0.", f"layers.{rank}.")].data)
    return own


def rows_of(step):
    """Yield the micro-batches of full rows, which use 16 of the 256 tokens."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(16, (BATCH // MICRO_BATCHES, FULL + 1), generator=generator)
        yield batch_of(rows=len(tokens), tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())


def train(run, pp):
    """Return what the last stage saw of the run, and of a run that resumes after step 6 if there is one stage."""
    with parallel(pp=pp) as state:
        training, saved = Training(run, pp, state), None
        for step in range(1, training.plan.steps + 1):
            training.step(step)
            if step == 6:
                saved = [copy.deepcopy(part.state_dict()) for part in training.parts()]
        if pp == 1:
            resumed = Training(run, pp, state)
            for part, values in zip(resumed.parts(), saved, strict=True):
                part.load_state_dict(values)
            for step in range(7, resumed.plan.steps + 1):
                resumed.step(step)
            training.seen["resumed"] = resumed.seen
        of_ranks = [None, None]
        torch.distributed.all_gather_object(of_ranks, training.seen)
        return of_ranks[1]
