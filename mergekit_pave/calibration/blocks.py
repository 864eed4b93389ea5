"""A forward pass block by block: every weight is read once, however little memory there is.

A *block* is a member of a `ModuleList` that runs exactly once per forward pass (a decoder
layer). All batches go through one block while its weights are held, then through the next.

A batch goes through block `k` within an ordinary forward pass of the whole model, in which the
blocks before `k` return at once what the last one of them returned, block `k` gets the input
that was kept for it, and the call of block `k + 1` ends the pass. Masks, position embeddings and
whatever else a model hands to its blocks are therefore its own, made anew each time; between
two blocks only the input of the next one and the output of the last one are kept.

A model that carries something else from block to block would give other results. One ordinary
pass (`observed`) leaves marks of what each block was given, and `Walk.agrees` compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from mergekit_pave.calibration.collect import Batch, Stop, forward
from mergekit_pave.calibration.states import States

# Entries that a mark of a tensor has at most.
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
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    members = {
        f"{name}.{i}": member for name in lists
        for i, member in enumerate(model.get_submodule(name))
        if next(member.parameters(), None) is not None}
    stack: list[str] = []
    order: list[str] = []
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    layers: dict[str, set[tuple[str, ...]]] = {}

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        stack.append(name)
        order.append(name)
        inputs[name] = [] if _first(args, kwargs) is None else _marks((args, kwargs))

    def leave(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        stack.remove(name)
        outputs[name] = _marks(output)

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
    for name in lists:
        own = [f"{name}.{i}" for i in range(len(model.get_submodule(name)))]
        inner = any(name.startswith(outer + ".") for outer in taken)
        once = all(order.count(n) == 1 and inputs[n] and outputs.get(n) for n in own)
        if len(own) > 1 and once and not inner:
            taken.append(name)
    blocks = [name for name in order if name.rpartition(".")[0] in taken]
    within = {
        layer: {next((b for b in calls if b in blocks), None) for calls in stacks}
        for layer, stacks in layers.items()}
    if blocks and all(len(places) == 1 for places in within.values()):
        found.blocks, found.within = tuple(blocks), within
        found.marks += [*(inputs[name] for name in blocks), outputs[blocks[-1]]]


class Walk:
    """All batches on their way through the blocks of a model, for use within `walking`.

    Args:
        model: the model, its weights perhaps offloaded by accelerate.
        blocks: names of its blocks in the order of their calls, from `observed`.
        batches: inputs of its forward passes.
        states: keeps what lies between the blocks.
        call: one forward pass of the model on a batch.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[str], batches: Sequence[Batch],
        states: States, call: Callable[[PreTrainedModel, Batch], Any] = forward,
    ):
        self.model = model
        self.call = call
        self.blocks = tuple(blocks)
        self.batches = list(batches)
        self.states = states
        # Of each batch: "next", the input of the next block; the last output of each list of
        # blocks by its name; and outputs of offloaded modules outside of the blocks.
        self._kept: list[dict[Any, Any]] = [{} for _ in self.batches]
        self._held: list[nn.Module] = []
        self._block = self._number = -1
        self._keep = False
        self._output: Any = None
        # What the next block is called with, or the last one's output.
        self._given: Any = None
        self._calls: dict[str, int] = {}

    @contextmanager
    def walking(self) -> Iterator[Walk]:
        """Have the model's blocks follow this walk; brings all batches to the first block."""
        inside = set(self.blocks)
        replaced: list[tuple[nn.Module, Any]] = []

        def replace(module: nn.Module, function: Callable) -> None:
            replaced.append((module, module.__dict__.get("forward")))
            module.forward = partial(function, module.forward)

        try:
            for number, name in enumerate(self.blocks):
                replace(self.model.get_submodule(name), partial(self._through, number))
            for name, module in self.model.named_modules():
                if has_offloaded_params(module) and not inside & set(_prefixes(name)):
                    replace(module, partial(self._outside, name, module))
            with self.at(-1):
                for number in range(len(self.batches)):
                    self.run(-1, number, True)
            yield self
        finally:
            for module, before in replaced:
                if before is None:
                    del module.forward
                else:
                    module.forward = before

    @contextmanager
    def at(self, block: int) -> Iterator[None]:
        """Hold the offloaded weights of a block, and what else is needed on the way there."""
        try:
            if 0 <= block < len(self.blocks):
                for module in self.model.get_submodule(self.blocks[block]).modules():
                    self._hold(module)
            yield
        finally:
            while self._held:
                module = self._held.pop()
                module._hf_hook.offload = True
                module._hf_hook.post_forward(module, None)

    def run(self, block: int, number: int, keep: bool) -> Any:
        """Send batch `number` through `block`, within `at(block)`.

        The batch goes on to the next block if `keep`, else it can be sent again. Block -1 is all
        that comes before the first one, `len(blocks)` all that comes after the last one, and
        returns the model's output.
        """
        self._block, self._number, self._keep, self._calls = block, number, keep, {}
        self._output = self._given = None
        return self.call(self.model, self.batches[number])

    def agrees(self, marks: Sequence[Sequence[Tensor]]) -> bool:
        """Whether the last run came to what an ordinary pass over the same batch met there."""
        found, expected = _marks(self._given), marks[self._block + 1]
        return len(found) == len(expected) and all(map(_close, found, expected))

    def _through(self, number: int, real: Callable, *args: Any, **kwargs: Any) -> Any:
        """In place of the forward method of block `number`."""
        kept = self._kept[self._number]
        if number < self._block:
            return self.states.get(kept[_list_of(self.blocks[number])])
        if number > self._block:  # the next one
            x, output = self.states.keep(_first(args, kwargs), self._output)
            if self._block >= 0:
                kept[_list_of(self.blocks[self._block])] = output
            kept["next"] = x
            self._given = (args, kwargs)
            raise Stop
        args, kwargs = _with_first(args, kwargs, self.states.get(kept["next"]))
        self._output = real(*args, **kwargs)
        if not self._keep:
            raise Stop
        if number == len(self.blocks) - 1:
            self._given = self._output
            (kept[_list_of(self.blocks[number])],) = self.states.keep(self._output)
            del kept["next"]
            raise Stop
        return self._output

    def _outside(
        self, name: str, module: nn.Module, real: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the forward method of a module with offloaded weights outside of blocks.

        Its output is kept, so that a large embedding is not read again for every block.
        """
        call = self._calls[name] = self._calls.get(name, -1) + 1
        kept = self._kept[self._number].setdefault(("outside", name), [])
        if call < len(kept):
            return self.states.get(kept[call])
        self._hold(module)
        output = real(*args, **kwargs)
        # A module with others inside it has to run: these may be watched.
        if self._block < len(self.blocks) and not any(True for _ in module.children()):
            kept += self.states.keep(output)
        return output

    def _hold(self, module: nn.Module) -> None:
        if has_offloaded_params(module):
            module._hf_hook.pre_forward(module)
            # Until it is released the hook leaves the weights where they are.
            module._hf_hook.offload = False
            self._held.append(module)


def outputs(
    model: PreTrainedModel, batches: Sequence[Batch], scratch: Path, room: int
) -> Iterator[Any]:
    """The model's outputs, batch by batch, with every weight read once for all of them.

    A first pass over one row of the first batch finds the blocks and is compared with. A model
    without blocks, or one that goes its own way between them, runs as a whole for each batch.

    Args:
        model: perhaps larger than memory, its weights offloaded by accelerate.
        batches: inputs of its forward passes.
        scratch: folder for states beyond `room` bytes of main memory.
        room: bytes of states in main memory.
    """
    call = partial(forward, logits=True)
    probe = {name: value[:1] for name, value in batches[0].items()}
    with observed(model, {}) as seen:
        call(model, probe)
    if seen.blocks:
        walk = Walk(model, seen.blocks, [probe, *batches], States(room, scratch), call)
        with walk.walking():
            if all(_advance(walk, block, seen.marks) for block in range(len(seen.blocks))):
                with walk.at(len(seen.blocks)):
                    for number in range(1, len(walk.batches)):
                        yield walk.run(len(seen.blocks), number, False)
                return
    for batch in batches:
        yield call(model, batch)


def _advance(walk: Walk, block: int, marks: Sequence[Sequence[Tensor]]) -> bool:
    with walk.at(block):
        walk.run(block, 0, True)
        if not walk.agrees(marks):
            return False
        for number in range(1, len(walk.batches)):
            walk.run(block, number, True)
    return True


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


def _first(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    x = args[0] if args else kwargs.get("hidden_states")
    return x if isinstance(x, Tensor) and x.is_floating_point() else None


def _with_first(args: tuple, kwargs: dict[str, Any], x: Tensor) -> tuple[tuple, dict[str, Any]]:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def _marks(tree: Any) -> list[Tensor]:
    """Entries, evenly spread, of all floating tensors of a tree: enough to tell them from others.
    """
    flat = [
        leaf.detach().reshape(-1) for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [x[:: max(1, x.numel() // _MARK)].cpu().clone() for x in flat]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    eps = torch.finfo(b.dtype).eps
    # Masks have the lowest number of their dtype where nothing is to be seen.
    a, b = (x.double().clamp(-1e30, 1e30) for x in (a, b))
    error, size = (a - b).norm(), b.norm()
    # The same kernels on the same numbers: not more than another order of sums may differ.
    return bool(error <= max(1e-5, 4 * eps) * size)
