"""Rows that are images, as the model's own processor makes them."""

from __future__ import annotations

import sys

import datasets
import numpy
import pytest
import transformers
from helpers.samples import llama
from PIL import Image

from mergekit_pave.calibration.samples import batches, load_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.parameters import CalibrationSpec

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def vit(tmp_path):
    folder = tmp_path / "vit"
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def vit_config(**options):
    return transformers.ViTConfig(image_size=8, patch_size=4, hidden_size=8, **options)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA", "P")):
        Image.new(mode, (5 + i, 9), i).save(folder / f"{i}.png")
    return folder


def test_image_folder(pictures, vit):
    samples = load_samples(CalibrationSpec(str(pictures)), vit, vit_config())
    assert samples.tokens == len(samples.items) == 4
    assert all(item["pixel_values"].shape == (3, 8, 8) for item in samples.items)
    batch, = batches(samples, 8)
    assert set(batch) == {"pixel_values"} and batch["pixel_values"].shape == (4, 3, 8, 8)


def test_saved_images_and_broken_ones(tmp_path, vit, caplog):
    good = Image.fromarray(numpy.zeros((4, 4, 3), numpy.uint8))
    features = datasets.Features({"img": datasets.Image()})
    rows = [{"img": good}, {"img": None}, {"img": {"bytes": b"broken", "path": None}}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    samples = load_samples(CalibrationSpec(str(tmp_path / "saved")), vit, vit_config())
    assert len(samples.items) == 1
    assert samples.notes["skipped"] == {"empty": 1, "not a readable image": 1}


def test_image_paths_start_at_the_file_that_names_them(load, pictures, vit):
    rows = [{"file": "pictures/0.png"}, {"file": str(pictures / "1.png")}, {"file": "gone.png"}]
    samples = load(rows, vit_config(), path=vit, text_column="file")
    assert len(samples.items) == 2 and samples.notes["skipped"] == {"not a readable image": 1}


def test_images_that_the_processor_refuses_are_skipped(pictures, vit, monkeypatch):
    def refuse(self, images, **options):
        if images.size[0] == 5:
            raise ValueError("too narrow")
        return original(self, images=images, **options)

    kind = type(transformers.AutoImageProcessor.from_pretrained(vit))
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", refuse)
    samples = load_samples(CalibrationSpec(str(pictures)), vit, vit_config())
    assert samples.notes["skipped"] == {"refused by the image processor": 1}


def test_images_and_text_do_not_mix(load, pictures, vit, model):
    with pytest.raises(PaveError, match="takes images, but text_column 'text' holds text"):
        load([{"text": "w1 w2."}], vit_config(), path=vit)
    with pytest.raises(PaveError, match="takes images, but text_column names 2 columns"):
        load([{"a": "w1", "b": "w2"}], vit_config(), path=vit, text_column="a,b")
    with pytest.raises(PaveError, match="model takes text, and .*pictures' has images"):
        load_samples(CalibrationSpec(str(pictures)), model, llama())
    with pytest.raises(PaveError, match="holds images, but no image processor could be loaded"):
        load_samples(CalibrationSpec(str(pictures)), model, vit_config())
    with pytest.raises(PaveError, match="takes input_features, and calibration data can be text"):
        load([{"text": "w1"}], transformers.WhisperConfig())


def test_missing_pillow(load, monkeypatch, pictures, vit):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(PaveError, match=r"pip install mergekit-pave\[vision\]"):
        load_samples(CalibrationSpec(str(pictures)), vit, vit_config())
    with pytest.raises(PaveError, match=r"pip install mergekit-pave\[vision\]"):
        load([{"text": "0.png"}], vit_config(), path=vit)
