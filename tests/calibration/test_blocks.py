"""Block by block: the covariances of whole passes, every weight read once, whatever the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import write_images, write_tokenizer
from helpers.shards import reads
from torch import nn

from mergekit_pave.calibration.blocks import Walk
from mergekit_pave.calibration.collect import forward
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.observed import observed
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.calibration.states import States
from mergekit_pave.models.layers import linear_layers
from mergekit_pave.models.source import ModelSource
from mergekit_pave.recipe.parameters import CalibrationSpec

KINDS = {"llama": 2, "roberta": 2, "deberta": 2, "gpt2": 2, "t5": 4, "bert": 2, "vit": 2}
SMALL = dict(vocab_size=94, num_hidden_layers=4, num_attention_heads=4, hidden_size=32,
             intermediate_size=48, pad_token_id=0)
OTHERS = {
    # Masks, and position embeddings, of two kinds in turns.
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2),
    "ModernBertModel": transformers.ModernBertConfig(
        **SMALL, global_attn_every_n_layers=2, local_attention=4, cls_token_id=1, sep_token_id=2),
    # One block's weights in every place, an encoder and a decoder, convolutions in between.
    "AlbertModel": transformers.AlbertConfig(**SMALL, embedding_size=16),
    "BartForConditionalGeneration": transformers.BartConfig(
        vocab_size=94, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0,
        max_position_embeddings=64),
    "DebertaV2Model": transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], conv_kernel_size=3,
        max_position_embeddings=64, position_buckets=8),
    "MixtralForCausalLM": transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4),
    "Qwen3NextForCausalLM": transformers.Qwen3NextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
}


def source_of(path) -> ModelSource:
    return ModelSource(str(path), path.name, str(path))


def assert_same(found, whole) -> None:
    """The stores of a walk and of ordinary passes, to 1e-6."""
    assert found.sites.keys() == whole.sites.keys() and found.weights == whole.weights
    assert found.skipped == whole.skipped
    for site in whole.sites:
        assert found.sites[site].count == whole.sites[site].count
        expected = whole.covariance(site).double()
        assert (found.covariance(site).double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.fixture
def walks(monkeypatch) -> list[Walk]:
    """The walks that were made, and that came to the end of their blocks, as they are made."""
    made: list[Walk] = []
    real = Walk.walking

    def walking(self):
        made.append(self)
        return real(self)

    monkeypatch.setattr(Walk, "walking", walking)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 12_000], ids=["files", "memory"])
def test_a_walk_gives_what_whole_passes_give(
    families, texts, tmp_path, kind, budget, walks, caplog
):
    path = families(kind)["expert0"]
    data, column = texts[0], "text"
    if kind == "vit":
        data, column = write_images(tmp_path / "images"), "image"
    spec = CalibrationSpec(dataset=str(data), text_column=column, num_samples=40)
    whole = calibrate_to(source_of(path), spec, tmp_path / "whole", Resources())
    assert not walks
    with caplog.at_level("INFO"):
        store = calibrate_to(
            source_of(path), spec, tmp_path / "s", Resources(statistics_memory=budget))
    assert len(walks[0].blocks) == KINDS[kind]
    assert "does not run block by block" not in caplog.text
    assert_same(store, whole)
    assert not list(store.folder.glob(".offload*"))


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_with_something_between_their_blocks(tmp_path, texts, name, walks, caplog):
    torch.manual_seed(0)
    getattr(transformers, name)(OTHERS[name]).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    source = source_of(tmp_path / "model")
    spec = CalibrationSpec(dataset=str(texts[0]), num_samples=12)
    whole = calibrate_to(source, spec, tmp_path / "whole", Resources())
    with caplog.at_level("INFO"):
        store = calibrate_to(source, spec, tmp_path / "s", Resources(statistics_memory=1))
    assert_same(store, whole)
    # Layers that run several times in a pass have no place of their own.
    assert bool(walks) == (name != "AlbertModel")
    assert "does not run block by block" not in caplog.text


def test_every_weight_is_read_once(families, texts, tmp_path, monkeypatch):
    path = families("llama")["expert0"]
    spec = CalibrationSpec(dataset=str(texts[0]), num_samples=40, batch_size=4)
    read = reads(monkeypatch)
    calibrate_to(source_of(path), spec, tmp_path / "s",
                 Resources(max_memory=20_000, statistics_memory=1))
    assert read
    # In the pass that plans, and in the walk.
    assert max(read.values()) == 2, read


class Skipping(transformers.PreTrainedModel):
    """Each block also gets the output of the first one: more than lies between two blocks."""

    config_class = transformers.BertConfig

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.dense = nn.Linear(width, width)

        def forward(self, x, first=None):
            return torch.tanh(self.dense(x if first is None else x - first))

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = nn.ModuleList(self.Block(config.hidden_size) for _ in range(4))
        self.post_init()

    def forward(self, input_ids, **unused):
        x, first = self.embed(input_ids), None
        for block in self.layer:
            x = block(x, first)
            first = x if first is None else first
        return x


def test_a_model_that_carries_more_between_blocks_goes_window_by_window(
    tmp_path, texts, monkeypatch, caplog
):
    from mergekit_pave.calibration import run

    torch.manual_seed(0)
    model = Skipping(transformers.BertConfig(**SMALL)).eval()
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    # No class of transformers has this architecture, so that it cannot be loaded by its name.
    monkeypatch.setattr(run, "load_model", lambda *a, **k: model)
    source = source_of(tmp_path / "model")
    spec = CalibrationSpec(dataset=str(texts[0]), num_samples=12)
    whole = calibrate_to(source, spec, tmp_path / "whole", Resources())
    with caplog.at_level("INFO"):
        store = calibrate_to(source, spec, tmp_path / "s", Resources(statistics_memory=1))
    assert "does not run block by block" in caplog.text
    assert_same(store, whole)
    assert "forward" not in vars(model.layer[0])


def test_layers_that_no_row_reached_have_the_place_of_their_name(families):
    model = transformers.LlamaForCausalLM.from_pretrained(families("llama")["base"])
    modules = linear_layers(model).modules
    ids = torch.tensor([[5, 6, 7]])
    with observed(model, modules) as seen:
        forward(model, {"input_ids": ids})
    assert seen.blocks == ("model.layers.0", "model.layers.1")
    assert seen.place("model.layers.1.mlp.up_proj.weight") == 1
    assert seen.place("model.layers.0.mlp.experts.3.up_proj.weight") == 0
    assert seen.place("model.projection.weight") == 2


def test_states_beyond_their_room_lie_in_files_that_go_with_them(tmp_path):
    states, x, y = States(48, tmp_path / "states"), torch.ones(3, 4), torch.zeros(2, 2)
    one, two = states.keep((x, None), {"again": x, "more": y})
    assert states.used == 48 and len(list((tmp_path / "states").iterdir())) == 1
    states.get(one)[0].add_(1)
    assert torch.equal(states.get(one)[0], x) and states.get(one)[1] is None
    assert torch.equal(states.get(two)["more"], y)
    del one, two
    assert states.used == 0 and not list((tmp_path / "states").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_large_model_is_read_less_than_by_windows(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "blocks.py"
    subprocess.run([sys.executable, script, "--json", tmp_path / "f.json"], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["weights read, windows / blocks"] > 3
    assert figures["cpu, windows / blocks"] > 1.6
    assert figures["peak, windows / blocks"] > 0.95
    assert figures["largest difference"] < 1e-6
