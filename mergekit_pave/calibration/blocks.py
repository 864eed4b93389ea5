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

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergekit_pave.calibration.collect import Batch, Stop, forward
from mergekit_pave.calibration.observed import first_of, marks_of
from mergekit_pave.calibration.states import States

_TRIM = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "malloc_trim", None)


class Walk:
    """All batches on their way through the blocks of a model, for use within `walking`.

    Args:
        model: the model, its weights perhaps offloaded by accelerate.
        blocks: names of its blocks in the order of their calls, from `observed`.
        batches: inputs of its forward passes.
        states: keeps what lies between the blocks.
        logits: as in `forward`.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[str], batches: Sequence[Batch],
        states: States, logits: bool = False,
    ):
        self.model = model
        self.logits = logits
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
        """Keep in memory the offloaded weights of a block and of modules that run before it."""
        try:
            if 0 <= block < len(self.blocks):
                for module in self.model.get_submodule(self.blocks[block]).modules():
                    self._hold(module)
            yield
        finally:
            while self._held:
                module = self._held.pop()
                hook = _hook(module)
                hook.offload = True
                hook.post_forward(module, None)
            trim()

    def run(self, block: int, number: int, keep: bool) -> Any:
        """Send batch `number` through `block`, within `at(block)`.

        The batch goes on to the next block if `keep`, else it can be sent again. Block -1 is all
        that comes before the first one, `len(blocks)` all that comes after the last one, and
        returns the model's output.
        """
        self._block, self._number, self._keep, self._calls = block, number, keep, {}
        self._output = self._given = None
        return forward(self.model, self.batches[number], logits=self.logits)

    def agrees(self, marks: Sequence[Sequence[Tensor]]) -> bool:
        """Whether the last run came to what an ordinary pass over the same batch met there."""
        found, expected = marks_of(self._given), marks[self._block + 1]
        return len(found) == len(expected) and all(map(_close, found, expected))

    def _through(self, number: int, real: Callable, *args: Any, **kwargs: Any) -> Any:
        """In place of the forward method of block `number`."""
        kept = self._kept[self._number]
        if number < self._block:
            return self.states.get(kept[_list_of(self.blocks[number])])
        if number > self._block:  # the next one
            x, output = self.states.keep(first_of(args, kwargs), self._output)
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
        # A module with children has to run each time, because its children may be watched.
        if self._block < len(self.blocks) and not any(True for _ in module.children()):
            kept += self.states.keep(output)
        return output

    def _hold(self, module: nn.Module) -> None:
        if has_offloaded_params(module):
            hook = _hook(module)
            hook.pre_forward(module)
            # Until it is released the hook leaves the weights where they are.
            hook.offload = False
            self._held.append(module)


def trim() -> None:
    """Give freed memory back to the system.

    glibc keeps small freed pieces for later use, beside which the next block's weights are loaded.
    """
    if _TRIM is not None:
        _TRIM(0)


def _hook(module: nn.Module) -> Any:
    """accelerate's hook, which loads offloaded weights and frees them again."""
    return module._hf_hook


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


def _with_first(args: tuple, kwargs: dict[str, Any], x: Tensor) -> tuple[tuple, dict[str, Any]]:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    eps = torch.finfo(b.dtype).eps
    # Attention masks hold the lowest number of their dtype, which would overflow in a norm.
    a, b = (x.double().clamp(-1e30, 1e30) for x in (a, b))
    error, size = (a - b).norm(), b.norm()
    # Both passes run the same kernels on the same numbers, so only the order of sums may differ.
    return bool(error <= max(1e-5, 4 * eps) * size)
