"""A model larger than its budgets: main memory stays within what was allowed (`-m slow`)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file

from mergekit_pave.storage.covariances import CovarianceStore

MB = 10**6
WEIGHTS, STATISTICS = 500 * MB, 250 * MB
WIDEST = 5632
LARGEST_SITE = 4 * WIDEST**2
# Imports first, so that the parent can tell the interpreter's memory from the calibration's.
CHILD = """
import sys
from pathlib import Path
from mergekit_pave import cli
import mergekit_pave.calibration.run, mergekit_pave.check.models, mergekit_pave.models.source
import transformers.models.llama.modeling_llama, accelerate.big_modeling
import torch
torch.randn(512, 512) @ torch.randn(512, 512)
print("ready", flush=True)
sys.stdin.readline()
cli.main()
"""


def write_model(folder: Path, dtype: torch.dtype, layers: int) -> int:
    """A Llama of `layers` layers, random, written shard by shard; returns its bytes on disk."""
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=WIDEST, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=64, dtype=dtype,
        architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with init_empty_weights():
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    shards: list[dict[str, torch.Tensor]] = [{}]
    where, total = {}, 0
    for name, meta in shapes.items():
        if sum(t.nbytes for t in shards[-1].values()) > 300 * MB:
            _write(folder, shards)
            shards.append({})
        tensor = torch.empty(meta.shape, dtype=dtype).normal_(std=0.02)
        shards[-1][name] = torch.ones_like(tensor) if tensor.ndim == 1 else tensor
        where[name] = f"model-{len(shards) - 1}.safetensors"
        total += tensor.nbytes
    _write(folder, shards)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write(folder: Path, shards: list[dict]) -> None:
    save_file(shards[-1], folder / f"model-{len(shards) - 1}.safetensors", {"format": "pt"})
    shards[-1] = {}


def peak_of(arguments: list) -> tuple[int, int, int]:
    """Of a calibration: anonymous memory before it began, and at most, and bytes written."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    status = Path(f"/proc/{process.pid}/status")
    before, seen, written = _anonymous(status), [0], [0]
    observed = psutil.Process(process.pid)

    def watch() -> None:
        while process.poll() is None:
            seen.append(_anonymous(status))
            with suppress(psutil.Error):
                written.append(observed.io_counters().write_bytes)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    _, err = process.communicate("go\n", timeout=1500)
    thread.join()
    assert process.returncode == 0, err
    return before, max(seen), max(written)


def _anonymous(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon")), 0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype, layers", [(torch.bfloat16, 14), (torch.float32, 7)], ids=str)
def test_a_model_larger_than_its_budgets(tmp_path, dtype, layers):
    model = tmp_path / "model"
    assert write_model(model, dtype, layers) > 1500 * MB
    data = tmp_path / "data.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 32_000, (4, 32), generator=generator).tolist()
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    before, peak, written = peak_of([
        "calibrate", model, "--dataset", data, "--text-column", "input_ids", "--batch-size", 4,
        "--max-memory", WEIGHTS, "--statistics-memory", STATISTICS, "-o", tmp_path / "store"])
    allowed = 1.2 * (WEIGHTS + STATISTICS) + LARGEST_SITE
    figures = (f"{(peak - before) / MB:.0f} MB beyond the {before / MB:.0f} MB of the imports, "
               f"allowed {allowed / MB:.0f} MB, of which the largest site {LARGEST_SITE / MB:.0f}")
    sys.stderr.write(f"\n{dtype}: {figures}\n")
    store = CovarianceStore(tmp_path / "store")
    assert len(store.weights) == 7 * layers
    # The weights were read where they lie: nothing was copied to disk but the statistics.
    used = sum(f.stat().st_size for f in store.folder.iterdir())
    assert written < used + 100 * MB
    assert peak - before < allowed, figures
