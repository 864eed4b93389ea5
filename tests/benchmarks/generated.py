"""Generated Llama-shaped models in shards, and what a command that works on them costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARD = 300 * 10**6
WORDS = 900


@dataclass(frozen=True)
class Shape:
    """Of a Llama: `width` features, `inner` in its MLP, `narrow` in keys and values."""

    width: int = 2048
    inner: int = 5632
    narrow: int = 512
    layers: int = 24
    vocabulary: int = 32_000

    @property
    def weights(self) -> list[tuple[int, int]]:
        """`(out, in)` of the linear layers of one block."""
        w, i, n = self.width, self.inner, self.narrow
        return [(w, w), (w, w), (n, w), (n, w), (i, w), (i, w), (w, i)]

    @property
    def parameters(self) -> int:
        block = sum(a * b for a, b in self.weights)
        return self.layers * block + 2 * self.vocabulary * self.width


def write_model(folder: Path, shape: Shape, expert: int | None = None) -> Path:
    """A model in bfloat16, shard by shard: the base, or a fine-tune of it.

    Spectra fall as one over the root of the rank in the inputs; a fine-tune differs by a tenth of
    the base's spread, unlike real ones in that its difference has no low rank.
    """
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.narrow // 64, max_position_embeddings=512,
        dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    vocabulary = {"<s>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    with init_empty_weights():
        shapes = LlamaForCausalLM(config).state_dict()
    shard: dict = {}
    where: dict[str, str] = {}
    total = count = 0
    for number, (name, meta) in enumerate(shapes.items()):
        if sum(t.nbytes for t in shard.values()) > SHARD:
            save_file(shard, folder / f"model-{count}.safetensors", {"format": "pt"})
            shard, count = {}, count + 1
        tensor = torch.ones(meta.shape)
        if meta.ndim == 2:
            scale = torch.arange(1, meta.shape[1] + 1) ** -0.25
            draw = torch.Generator().manual_seed(number)
            tensor = torch.randn(meta.shape, generator=draw).mul_(0.05).mul_(scale)
            if expert is not None:
                draw = torch.Generator().manual_seed(10_000 * (expert + 1) + number)
                tensor += 0.1 * tensor.std() * torch.randn(meta.shape, generator=draw)
        shard[name] = tensor.bfloat16()
        where[name] = f"model-{count}.safetensors"
        total += shard[name].nbytes
    save_file(shard, folder / f"model-{count}.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_data(path: Path, rows: int, length: int, seed: int = 0) -> Path:
    """Texts of `length` words each."""
    import random

    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            words = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(length))
            file.write(json.dumps({"text": words}) + "\n")
    return path


@dataclass(frozen=True)
class Cost:
    """Of one command.

    Attributes:
        wall: seconds.
        cpu: seconds of its processor time.
        peak: bytes of anonymous memory at most, sampled every 10 ms.
        read: bytes that came from the disk; what the page cache holds costs none.
        written: bytes that went to the disk or will.
    """

    wall: float
    cpu: float
    peak: int
    read: int
    written: int

    def ratios(self, to: Cost) -> dict[str, float]:
        return {name: value / max(1e-9, getattr(to, name)) for name, value in asdict(self).items()}


def cost_of(command: list, environment: Mapping[str, str] | None = None) -> tuple[Cost, str]:
    """Run a command to its end; returns its cost and what it wrote to stderr.

    Reads Linux's /proc. Exits with the command's message if it fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **(environment or {})})
    watch = _Watch(process.pid)
    err = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command}\n{err[-3000:]}")
    return watch.cost(start, usage), err


def cost_of_call(work: Callable[[], None]) -> Cost:
    """Of a function in a fork of this process: what it costs beyond the imports made here."""
    sys.stdout.flush()
    start = time.perf_counter()
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    watch = _Watch(child)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit("the measured call failed")
    return watch.cost(start, usage)


class _Watch:
    """Samples a process every 10 ms until `cost` is asked for."""

    def __init__(self, process: int):
        self.seen = {"RssAnon": 0, "read_bytes": 0, "write_bytes": 0}
        self._process, self._over = Path(f"/proc/{process}"), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.01):
            with suppress(OSError, ValueError, IndexError):
                for file in ("status", "io"):
                    for line in (self._process / file).read_text().splitlines():
                        key, _, value = line.partition(":")
                        if key in self.seen:
                            unit = 1024 if value.endswith("kB") else 1
                            self.seen[key] = max(self.seen[key], unit * int(value.split()[0]))

    def cost(self, start: float, usage: Any) -> Cost:
        """What the process has used since `start`; `usage` as `os.wait4` has it."""
        self._over.set()
        self._thread.join()
        return Cost(
            time.perf_counter() - start, usage.ru_utime + usage.ru_stime, self.seen["RssAnon"],
            self.seen["read_bytes"], self.seen["write_bytes"])


def forget(*folders: Path) -> None:
    """Have the page cache drop the files of these folders, so that reading them counts."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
