"""Every example is accepted by `check`, with tiny models in the place of those it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import make_family, write_images

from mergekit_pave.check import check
from mergekit_pave.models.source import LoaderOptions

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yml"))
KINDS = {"llms": "llama", "chat": "llama", "adapters": "llama", "classifiers": "roberta",
         "embeddings": "bert", "images": "vit"}


def _chats(path: Path) -> str:
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(80)))
    return str(path)


def _with_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    path.write_text(json.dumps(settings))


def _adapter(folder: Path, base: Path) -> str:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_check_accepts_it(example, tmp_path):
    text = example.read_text("utf-8")
    assert [line.startswith("#") for line in text.splitlines()[:4]] == [True] * 3 + [False]
    raw = yaml.safe_load(text)
    paths = make_family(tmp_path / "models", KINDS[example.stem])
    raw["base_model"] = str(paths["base"])
    for i, entry in enumerate(raw["models"]):
        entry["model"] = str(paths[f"expert{i}"])
        if example.stem == "adapters":
            adapter = _adapter(tmp_path / f"adapter{i}", paths["base"])
            entry["model"] = f"{paths['base']}+{adapter}"
        if example.stem == "chat":
            _with_template(paths[f"expert{i}"])
            entry["parameters"]["calibration_dataset"] = _chats(tmp_path / f"{i}.jsonl")
        if example.stem == "images":
            folder = write_images(tmp_path / f"images{i}", seed=i)
            entry["parameters"]["calibration_dataset"] = str(folder)
    options = LoaderOptions(lora_merge_cache=str(tmp_path / "cache"))
    assert [str(f) for f in check(raw, options) if f.level == "error"] == []


def test_every_example_has_its_kind():
    assert {path.stem for path in EXAMPLES} == KINDS.keys()
