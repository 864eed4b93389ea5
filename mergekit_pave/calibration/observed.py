"""What one ordinary forward pass shows of a model: its blocks, and what they are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# A mark of a tensor has fewer than twice as many entries.
_MARK = 1 << 14


@dataclass
class Observed:
    """What one ordinary forward pass showed.

    Attributes:
        blocks: names of the blocks in the order of their calls; empty if there are none.
        within: name of a watched layer -> the blocks in which it was called (`None`: outside).
        marks: of all that each block was given, and of the output of the last one.
    """

    blocks: tuple[str, ...] = ()
    within: dict[str, set[str | None]] = field(default_factory=dict)
    marks: list[list[Tensor]] = field(default_factory=list)

    def place(self, layer: str) -> int:
        """Index of the block that a watched layer lies in, `len(blocks)` outside of all.

        A layer that was not called counts to the block that its name lies in.
        """
        seen = self.within.get(layer)
        if seen is None:
            seen = {block for block in self.blocks if layer.startswith(block + ".")}
        block = next(iter(seen), None)
        return len(self.blocks) if block is None else self.blocks.index(block)


@contextmanager
def observed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[Observed]:
    """Have the one forward pass made within this context recorded; filled in at its end.

    No blocks are found when one of `modules` is called within several of them.
    """
    found = Observed()
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    members = {
        f"{name}.{i}": member for name, part in lists.items() for i, member in enumerate(part)
        if next(member.parameters(), None) is not None}
    stack: list[str] = []
    order: list[str] = []
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    layers: dict[str, set[tuple[str, ...]]] = {}

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        stack.append(name)
        order.append(name)
        inputs[name] = [] if first_of(args, kwargs) is None else marks_of((args, kwargs))

    def leave(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        stack.remove(name)
        outputs[name] = marks_of(output)

    def see(name: str, module: nn.Module, args: tuple) -> None:
        layers.setdefault(name, set()).add(tuple(stack))

    handles = [h for name, member in members.items() for h in (
        member.register_forward_pre_hook(partial(enter, name), with_kwargs=True),
        member.register_forward_hook(partial(leave, name)))]
    handles += [m.register_forward_pre_hook(partial(see, name)) for name, m in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    taken: list[str] = []
    calls = Counter(order)
    for name, part in lists.items():
        own = [f"{name}.{i}" for i in range(len(part))]
        inner = any(name.startswith(outer + ".") for outer in taken)
        once = all(calls[n] == 1 and inputs[n] and outputs.get(n) for n in own)
        if len(own) > 1 and once and not inner:
            taken.append(name)
    blocks = [name for name in order if name.rpartition(".")[0] in taken]
    within = {
        layer: {next((b for b in inside if b in blocks), None) for inside in stacks}
        for layer, stacks in layers.items()}
    if blocks and all(len(places) == 1 for places in within.values()):
        found.blocks, found.within = tuple(blocks), within
        found.marks += [*(inputs[name] for name in blocks), outputs[blocks[-1]]]


def first_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The floating tensor that a block works on: its first argument, or `hidden_states`."""
    x = args[0] if args else kwargs.get("hidden_states")
    return x if isinstance(x, Tensor) and x.is_floating_point() else None


def marks_of(tree: Any) -> list[Tensor]:
    """Evenly spread entries of all floating tensors of a tree, which identify them."""
    flat = [
        leaf.detach().reshape(-1) for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [x[:: max(1, x.numel() // _MARK)].cpu().clone() for x in flat]
