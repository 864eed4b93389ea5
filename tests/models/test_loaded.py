"""What transformers has loaded against what the files say."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from helpers import make_family, source_of, tensors_of
from safetensors.torch import save_file

from mergekit_pave.calibration.load import load_model
from mergekit_pave.errors import PaveError

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    return make_family(tmp_path, "llama", experts=1)["expert0"]


def write(folder, state, name="model.safetensors"):
    save_file(state, folder / name, metadata={"format": "pt"})


def test_a_leftover_adapter_is_not_applied(model):
    peft = pytest.importorskip("peft")
    before = load_model(source_of(model), device=CPU).state_dict()
    adapted = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(model),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(model)
    assert (model / "adapter_config.json").exists()
    after = load_model(source_of(model), device=CPU).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_foreign_names_are_no_random_weights(model):
    write(model, {f"module.{name}": t for name, t in tensors_of(model).items()})
    with pytest.raises(PaveError, match="no fitting weights .* it has module.* instead"):
        load_model(source_of(model), device=CPU)


def test_a_missing_head_counts_where_it_is_needed(tmp_path, caplog):
    model = make_family(tmp_path, "roberta", experts=1)["expert0"]
    state = {n: t for n, t in tensors_of(model).items() if not n.startswith("classifier")}
    write(model, state)
    load_model(source_of(model), device=CPU)
    assert "start at random" in caplog.text
    with pytest.raises(PaveError, match="classifier"):
        load_model(source_of(model), device=CPU, head=True)


def test_two_sets_of_weights(model):
    """mergekit reads the index, transformers the single file."""
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    state = tensors_of(model)
    places = ", ".join(f'"{name}": "other.safetensors"' for name in state)
    (model / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{places}}}}}')
    load_model(source_of(model), device=CPU)
    name = "model.layers.1.mlp.up_proj.weight"
    write(model, {**state, name: state[name] + 1})
    with pytest.raises(PaveError, match=f"other values for {name}"):
        load_model(source_of(model), device=CPU)


def test_the_cache_knows_code_that_may_run(model, tmp_path):
    source = source_of(model)
    trusted = type(source)(**{**vars(source), "trust_remote_code": True})
    without = trusted.identity(), source.identity()
    (model / "modeling_own.py").write_text("x = 1\n")
    assert trusted.identity() != without[0]
    assert source.identity() == without[1]


def test_numbers_of_one_byte_are_quantised(model):
    write(model, {name: t.to(torch.float8_e4m3fn) if "q_proj" in name else t
                  for name, t in tensors_of(model).items()})
    with pytest.raises(PaveError, match="q_proj.weight of .* one byte .*full-precision"):
        load_model(source_of(model), device=CPU)
