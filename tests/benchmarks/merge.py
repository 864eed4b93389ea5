"""`pave_ties` with a warm store against `ties`: wall time and peak memory of the stock command.

    python tests/benchmarks/merge.py [--layers 4] [--repeat 3] [--json PATH]

A generated Llama-shaped family (768 wide, 3072 inside, like RoBERTa-base) is calibrated once;
then both merges run alternately as subprocesses of `mergekit-yaml`. Start-up, which both pay,
is measured with `mergekit-yaml --help` and reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

WORDS = 900


def make_models(folder: Path, layers: int) -> dict[str, Path]:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=768, intermediate_size=3072,
        num_hidden_layers=layers, num_attention_heads=12, num_key_value_heads=12)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    paths = {}
    for name in ("base", "expert0", "expert1"):
        with torch.no_grad():
            for key, p in model.named_parameters():
                noise = 0 if name == "base" else 0.1 * base[key].std() * torch.randn_like(p)
                p.copy_(base[key] + noise)
        paths[name] = folder / name
        model.save_pretrained(paths[name])
        fast.save_pretrained(paths[name])
    return paths


def write_data(path: Path) -> Path:
    import random

    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(128):
            words = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(32))
            file.write(json.dumps({"text": words}) + "\n")
    return path


def write_config(folder: Path, method: str, paths: dict[str, Path], data: Path) -> Path:
    models = []
    for name in ("expert0", "expert1"):
        parameters = {"weight": 1.0, "density": 0.2}
        if method.startswith("pave_"):
            parameters["calibration_dataset"] = str(data)
        models.append({"model": str(paths[name]), "parameters": parameters})
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump({
        "merge_method": method, "base_model": str(paths["base"]), "models": models,
        "dtype": "float32"}))
    return path


def timed(*arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of one `mergekit-yaml` run."""
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(process.stderr.read().decode()[-3000:])
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MERGEKIT_PAVE_CACHE"] = str(folder / "cache")
        paths = make_models(folder, arguments.layers)
        data = write_data(folder / "data.jsonl")
        configs = {m: write_config(folder, m, paths, data) for m in ("ties", "pave_ties")}
        cold, cold_peak = timed(str(configs["pave_ties"]), str(folder / "out"), "--quiet")
        runs: dict[str, list[tuple[float, int]]] = {"start-up": [], "ties": [], "pave_ties": []}
        runs["pave_ties, decompositions afresh"] = []
        for _ in range(arguments.repeat):
            runs["start-up"].append(timed("--help"))
            for method, path in configs.items():
                runs[method].append(timed(str(path), str(folder / "out"), "--quiet"))
            shutil.rmtree(folder / "cache" / "decompositions")
            again = timed(str(configs["pave_ties"]), str(folder / "out"), "--quiet")
            runs["pave_ties, decompositions afresh"].append(again)
    seconds = {name: statistics.median(r[0] for r in rows) for name, rows in runs.items()}
    peak = {name: max(r[1] for r in rows) for name, rows in runs.items()}
    work = {name: seconds[name] - seconds["start-up"] for name in ("ties", "pave_ties")}
    result = {
        "layers": arguments.layers,
        "seconds": seconds,
        "first pave_ties run, with calibration": cold,
        "peak MiB": {name: value / 2**20 for name, value in peak.items()},
        "peak MiB of the first run": cold_peak / 2**20,
        "wall pave_ties / ties": seconds["pave_ties"] / seconds["ties"],
        "wall without start-up, pave_ties / ties": work["pave_ties"] / work["ties"],
        "wall pave_ties, decompositions afresh / ties":
            seconds["pave_ties, decompositions afresh"] / seconds["ties"],
        "peak pave_ties / ties": peak["pave_ties"] / peak["ties"],
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
