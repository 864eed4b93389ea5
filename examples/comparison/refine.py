"""Merges corrected block by block towards their experts, in memory, from rows without labels.

    python examples/comparison/refine.py --setting encoder --seeds 0,1
        [--methods tsv_m/matched_regmean] [--strengths matched:1] [--rows 128] [--ridges 0.1,1]

Every method so far takes each layer's inputs from the experts; in the merged model they are other
ones. Block after block, each linear layer `W` with inputs `x~` of the merged model, corrected so
far, and outputs `y` of the expert on the same row becomes

    W + (sum_t E[(y - W x~) x~^T]) (sum_t E[x~ x~^T] + r I)^-1,

where `y` of a layer that adds to the residual stream includes by how much the merged model's stream
differs from the expert's there. `r` is a share of the mean diagonal of the sum.

Other options, and where scores are kept, are those of `prototypes.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prototypes import Experts, chosen, options, report

# After `prototypes`, which says that nothing is to be downloaded.
import torch  # isort: skip
from torch import Tensor, nn

# Of each kind of block: its layers in the order of use, those of one stage together; and the
# module whose input is the residual stream that the stage's layers write to.
STAGES = {
    "BertLayer": (
        (("attention.self.query", "attention.self.key", "attention.self.value"), None),
        (("attention.output.dense",), ""),
        (("intermediate.dense",), None),
        (("output.dense",), "intermediate"),
    ),
    "LlamaDecoderLayer": (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
        (("self_attn.o_proj",), ""),
        (("mlp.gate_proj", "mlp.up_proj"), None),
        (("mlp.down_proj",), "post_attention_layernorm"),
    ),
}


@dataclass
class Batch:
    """Rows of one task on their way through merged model and expert."""

    merged: Tensor  # (rows, width, hidden), before the block at hand
    expert: Tensor
    real: Tensor  # (rows, width) bool: no padding
    options: dict  # of a block's call: masks and positions


def corrected(weight: Tensor, error: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """`W + E (M + r I)^-1`, float64.

    Args:
        weight: `W` (out, in).
        error: `E = sum_t E[(y - W x~) x~^T]` (out, in) float64.
        moment: `M = sum_t E[x~ x~^T]` (in, in) float64.
        ridge: `r` over the mean diagonal of `M`.
    """
    damped = moment.clone()
    damped.diagonal().add_(ridge * moment.diagonal().mean())
    return weight.double() + torch.linalg.solve(damped, error.mT).mT


@contextmanager
def watched(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Name -> input and output of these parts of a block in its latest call; "" is itself."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):
        def hook(_module, args, kwargs, output):
            seen[name] = args[0] if args else kwargs["hidden_states"], output
        return hook

    handles = [block.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
               for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Stop(Exception):
    """The last of the modules has been reached."""


def calls_of(modules: Sequence[nn.Module], call: Callable[[], object]) -> list[tuple[tuple, dict]]:
    """The arguments with which `call` calls these modules, in order; it ends at the last."""
    seen: list[tuple[tuple, dict]] = []

    def hook(module, args, kwargs):
        seen.append((args, kwargs))
        if module is modules[-1]:
            raise Stop

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        call()
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def through(block: nn.Module, states: Tensor, options: dict) -> Tensor:
    found = block(states, **options)
    return found[0] if isinstance(found, tuple) else found


def refine_block(
    block: nn.Module, experts: Sequence[nn.Module], batches: Sequence[Sequence[Batch]], ridge: float
) -> None:
    """Correct the block's layers in place, and carry all batches through it.

    Args:
        block: of the merged model.
        experts: task -> its expert's block.
        batches: task -> its rows.
    """
    stages = STAGES[type(block).__name__]
    layers = [name for names, _ in stages for name in names]
    streams = [stream for _, stream in stages if stream is not None]
    wanted, beside = {}, {}
    for task, (expert, of_task) in enumerate(zip(experts, batches, strict=True)):
        for place, batch in enumerate(of_task):
            with watched(expert, [*layers, *streams]) as seen:
                after = through(expert, batch.expert, batch.options)
            wanted[task, place] = {n: seen[n][1][batch.real] for n in layers}
            beside[task, place] = {n: seen[n][0][batch.real] for n in streams}
            batch.expert = after
    for names, stream in stages:
        errors, moment = dict.fromkeys(names, 0.0), 0.0
        for task, of_task in enumerate(batches):
            count = sum(int(batch.real.sum()) for batch in of_task)
            for place, batch in enumerate(of_task):
                needed = [stream] * (stream is not None) + [names[0]]
                calls = calls_of([block.get_submodule(name) for name in needed],
                                 lambda b=batch: through(block, b.merged, b.options))
                inputs = [(args or (kwargs["hidden_states"],))[0] for args, kwargs in calls]
                x = inputs[-1][batch.real]
                moment = moment + (x.mT @ x).double() / count
                for name in names:
                    error = wanted[task, place][name] - block.get_submodule(name)(x)
                    if stream is not None:
                        error = error + beside[task, place][stream] - inputs[0][batch.real]
                    errors[name] = errors[name] + (error.mT @ x).double() / count
        for name in names:
            layer = block.get_submodule(name)
            layer.weight.copy_(corrected(layer.weight, errors[name], moment, ridge))
    for of_task in batches:
        for batch in of_task:
            batch.merged = through(block, batch.merged, batch.options)


def first_states(model: nn.Module, block: nn.Module, inputs: dict) -> tuple[Tensor, dict]:
    """What the first block is called with."""
    (args, kwargs), = calls_of([block], lambda: model(**inputs))
    kwargs = dict(kwargs)
    states = args[0] if args else kwargs.pop("hidden_states")
    kwargs |= dict(zip(("attention_mask",), args[1:], strict=False))
    # Keys and values of earlier calls: a block is called with the same rows again and again.
    kwargs |= {name: None for name in ("cache", "past_key_values") if name in kwargs}
    return states, kwargs


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in STAGES]


def refined(model: nn.Module, experts: Sequence[nn.Module], rows: Sequence[Sequence[dict]],
            ridge: float) -> None:
    """Correct `model` in place. `rows`: task -> batches of what the tokenizer gave."""
    own, others = blocks_of(model), [blocks_of(expert) for expert in experts]
    batches = []
    for expert, of_expert, of_task in zip(experts, others, rows, strict=True):
        found = []
        for inputs in of_task:
            merged, options = first_states(model, own[0], inputs)
            start, _ = first_states(expert, of_expert[0], inputs)
            found.append(Batch(merged, start, inputs["attention_mask"].bool(), options))
        batches.append(found)
    for place, block in enumerate(own):
        refine_block(block, [blocks[place] for blocks in others], batches, ridge)


def unlabelled(experts: Experts, count: int, length: int, size: int = 16) -> list[list[dict]]:
    """Task -> batches of its first calibration rows, those of like length together."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(experts.out / "base", padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    result = []
    for task, _ in experts.tasks:
        lines = (experts.out / "calibration" / f"{task}.jsonl").read_text().splitlines()[:count]
        texts = sorted((json.loads(line)["text"] for line in lines), key=len)
        result.append([dict(tokenizer(texts[i : i + size], return_tensors="pt", padding=True,
                                      truncation=True, max_length=length))
                       for i in range(0, len(texts), size)])
    return result


def main() -> None:
    parser = options(__doc__, ["tsv_m", "blend", "matched_regmean"])
    parser.add_argument("--rows", type=int, default=128, help="of each task")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--ridges", type=lambda text: text.split(","), default=["0.1"])
    args = parser.parse_args()
    seeds, wanted = chosen(args), []
    for method in args.methods:
        for strength in args.strengths:
            start = f"{method} ({strength})"
            wanted += [start, *(f"{start}, refined {args.rows} {r}" for r in args.ridges)]
    for part in (part for parts in seeds for part in parts):
        for label in wanted:
            if label in part.rows:
                continue
            start, _, how = label.partition(", refined ")
            weights = part.merged(*start[:-1].rsplit(" (", 1))
            if how:
                begun = time.perf_counter()
                weights = corrected_weights(part, weights, args, float(how.split()[1]))
                print(f"  {time.perf_counter() - begun:.0f} s", flush=True)
            part.score(label, weights)
    report(seeds, wanted)


def corrected_weights(
    part: Experts, weights: dict[str, Tensor], args: argparse.Namespace, ridge: float
) -> dict[str, Tensor]:
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if part.setting.KIND == "causal" else AutoModel
    model = kind.from_pretrained(part.out / "base", dtype=torch.float32).eval()
    model.load_state_dict(weights, strict=False)
    others = [kind.from_pretrained(f, dtype=torch.float32).eval() for f in part.folders]
    refined(model, others, unlabelled(part, args.rows, args.length), ridge)
    found = model.state_dict()
    return {name: found[name].clone() for name in weights}


if __name__ == "__main__":
    main()
