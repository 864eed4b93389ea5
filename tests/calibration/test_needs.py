"""Models that take text and images in one forward pass are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from helpers import write_images, write_texts
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_pave.calibration.collect import plan_sites
from mergekit_pave.calibration.needs import missing_input
from mergekit_pave.calibration.samples import load_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import linear_layers
from mergekit_pave.recipe.parameters import CalibrationSpec

TEXT = dict(vocab_size=94, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
            intermediate_size=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              image_size=16, patch_size=4)


def clip():
    return hf.CLIPConfig(text_config=TEXT, vision_config=VISION, architectures=["CLIPModel"])


def siglip():
    return hf.SiglipConfig(text_config=dict(TEXT, projection_size=32), vision_config=VISION,
                           architectures=["SiglipModel"])


def blip(architecture: str):
    return hf.BlipConfig(text_config=dict(TEXT, encoder_hidden_size=32), vision_config=VISION,
                         image_text_hidden_size=32, architectures=[architecture])


def trocr():
    decoder = hf.TrOCRConfig(vocab_size=94, d_model=32, decoder_layers=2, decoder_ffn_dim=48,
                             decoder_attention_heads=4, max_position_embeddings=64)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**VISION), decoder)
    config.architectures = ["VisionEncoderDecoderModel"]
    return config


BOTH = [clip(), siglip(), blip("BlipForConditionalGeneration"),
        blip("BlipForImageTextRetrieval"), trocr()]


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.architectures[0])
@pytest.mark.parametrize("images", [False, True])
def test_models_of_two_inputs_are_known(config, images):
    assert missing_input(config, images)


def test_models_of_one_input_pass():
    llava = hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), image_token_id=90,
                           vision_config=hf.CLIPVisionConfig(**VISION),
                           architectures=["LlavaForConditionalGeneration"])
    git = hf.GitConfig(**TEXT, vision_config=VISION, architectures=["GitForCausalLM"])
    for config in (llava, git, hf.LlamaConfig(architectures=["LlamaForCausalLM"])):
        assert missing_input(config, images=False) is None
    vit = hf.ViTConfig(**VISION, architectures=["ViTForImageClassification"])
    assert missing_input(vit, images=True) is None


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.architectures[0])
def test_their_calibration_is_refused_in_a_sentence(tmp_path, config):
    text = CalibrationSpec(str(write_texts(tmp_path / "t.jsonl")))
    images = CalibrationSpec(str(write_images(tmp_path / "images")))
    for spec, kind in ((text, "text"), (images, "images")):
        with pytest.raises(PaveError, match=f"does not run on {kind} alone .* `covariance` store"):
            load_samples(spec, tmp_path, config)


def test_a_merge_of_them_is_refused_before_it_begins(tmp_path):
    models = []
    for name in ("base", "a", "b"):
        hf.SiglipModel(siglip()).save_pretrained(tmp_path / name)
        models.append(str(tmp_path / name))
    raw = {"merge_method": "regmean", "base_model": models[0],
           "models": [{"model": name} for name in models[1:]],
           "parameters": {"calibration_dataset": str(write_texts(tmp_path / "t.jsonl"))}}
    with pytest.raises(PaveError, match="does not run on text alone"):
        run_merge(MergeConfiguration.model_validate(raw), str(tmp_path / "out"),
                  MergeOptions(quiet=True), yaml.safe_dump(raw))
    assert not Path(tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "siglip"


def test_a_model_that_does_not_run_on_the_data_says_so(tmp_path):
    """Whatever else it needs: here the first pass itself finds it out."""
    model = hf.BlipForImageTextRetrieval(blip("BlipForImageTextRetrieval"))
    layers = linear_layers(model).modules
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(PaveError, match="BlipForImageTextRetrieval does not run on input_ids alone "
                                        r"\(TypeError: .*pixel_values.*`covariance` store"):
        plan_sites(model, layers, {"input_ids": ids})
