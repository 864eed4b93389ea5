"""What is uploaded is a list of known files, printed before; nothing else that lies there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_store
from helpers.cards import HUB, make_output
from safetensors.torch import load_file, save_file

from mergekit_pave.algebra.emr import Trace
from mergekit_pave.errors import PaveError
from mergekit_pave.publish.hub import merge_files, push_merge, push_store
from mergekit_pave.storage.archive import Reference
from mergekit_pave.storage.masks import FOLDER, Recorder

STRAY = ("rows.jsonl", "train.log", "optimizer.pt", "train.py", "model-00009-of-00009.safetensors",
         ".hidden", "notes.md", ".mergekit-pave-abc/content/x.safetensors", "emr/notes.txt",
         "adapter_model.safetensors", "checkpoint-1/model.safetensors", "figures/mine.png",
         # Called much like files of a tokenizer.
         "lid.model", "notes.jinja", "x.tiktoken", "rows_tokenizer.json", "my_processor.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def strew(folder: Path) -> None:
    for name in STRAY:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"mine")


def add_masks(folder: Path) -> None:
    base = torch.zeros(3, 2)
    recorder = Recorder(folder / FOLDER, {"m": "org/m"}, "base", Reference("b", None),
                        "float32", rearranges=False)
    recorder.add("x.weight", "base", base, [("m", Trace(base == 0, 1.0, 2.0))], "global", False)
    recorder.finish()


def test_only_the_merge_is_uploaded(hub, out, capsys):
    push_merge(out, "me/clean")
    clean = hub.repos["models/me/clean"]
    capsys.readouterr()
    strew(out)
    push_merge(out, "me/merge")
    assert hub.repos["models/me/merge"] == clean
    told = capsys.readouterr().err
    assert all(f"  {name} (" in told for name in clean)
    assert "Not uploaded: .hidden, .mergekit-pave-abc, adapter_model" in told
    assert all((out / name).read_bytes() == b"mine" for name in STRAY)


def test_the_list_is_printed_before_anything_is_sent(hub, out, monkeypatch):
    told = []
    monkeypatch.setattr("mergekit_pave.publish.hub.click.echo",
                        lambda text, err: told.append((text, list(hub.asked))))
    push_merge(out, "me/merge")
    (text, asked), = told
    assert text.startswith("Uploading ") and not asked and hub.asked


def test_code_of_a_model_goes_along(hub, out):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.My"}}))
    (out / "own.py").write_text("from .other import x\nVOCABULARY = 'own.tiktoken'\n")
    for name in ("other.py", "train.py", "own.tiktoken", "lid.model"):
        (out / name).write_text("")
    code = {n for n in merge_files(out) if n.endswith((".py", ".tiktoken", ".model"))}
    assert code == {"own.py", "other.py", "own.tiktoken"}


def test_masks_go_along_by_their_manifest(hub, out):
    add_masks(out)
    strew(out)
    push_merge(out, "me/merge")
    sent = {name for name in hub.repos["models/me/merge"] if name.startswith("emr/")}
    assert sent == {"emr/manifest.json", "emr/masks-00000.safetensors"}


@pytest.mark.parametrize("damage", ["none", "manifest", "file", "cut"])
def test_a_merge_of_tasks_needs_its_masks(hub, out, damage):
    source = HUB.replace("pave_ties", "emr")
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    fresh = make_output(out.parent / "emr", source)
    for name in ("README.md", "mergekit_config.yml", "pave_report.json"):
        shutil.copy(fresh / name, out)
    add_masks(out)
    file = out / FOLDER / "masks-00000.safetensors"
    if damage == "none":
        shutil.rmtree(out / FOLDER)
    elif damage == "manifest":
        (out / FOLDER / "manifest.json").unlink()
    elif damage == "file":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PaveError, match="no task masks|are damaged"):
        push_merge(out, "me/merge")
    assert not hub.created


@pytest.mark.parametrize("name", ["model-00001", "config.json", "tokenizer.json", "README.md"])
def test_links_out_of_the_folder_are_refused(hub, out, tmp_path, name):
    name = next((f.name for f in out.iterdir() if f.name.startswith(name)), name)
    secret = tmp_path / "secret"
    shutil.copy(out / name, secret) if (out / name).exists() else secret.write_text("{}")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(secret)
    with pytest.raises(PaveError, match="Nothing is uploaded: .* leads out of the folder"):
        push_merge(out, "me/merge")
    assert not hub.created


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors",
                                   "..", None])
def test_an_index_that_leads_elsewhere_is_refused(hub, out, tmp_path, shard):
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    index = out / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], shard)
    index.write_text(json.dumps(values))
    outside = r"index.json (names files outside|is no index).* merge again"
    with pytest.raises(PaveError, match=outside):
        push_merge(out, "me/merge")
    assert not hub.created


def test_a_shard_of_another_merge_is_refused(hub, out):
    shard = sorted(out.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard)
    with pytest.raises(PaveError, match=r"lacks .* merge again"):
        push_merge(out, "me/merge")
    assert not hub.created


@pytest.mark.parametrize("where", ["objects", "/commit/", "/preupload/", "/create"])
def test_an_upload_that_fails_midway_changes_nothing_there(hub, out, where):
    push_merge(out, "me/merge")
    before = dict(hub.repos["models/me/merge"])
    for file in out.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    hub.objects.clear()
    hub.refused = where
    with pytest.raises(PaveError, match="me/merge failed .*is as it was; try again with"):
        push_merge(out, "me/merge")
    assert hub.repos["models/me/merge"] == before
    hub.refused = ""
    push_merge(out, "me/merge")
    assert hub.repos["models/me/merge"] == contents(out)


# --- stores --------------------------------------------------------------------------------


def test_only_the_store_is_uploaded(hub, tmp_path, capsys):
    store = make_store(tmp_path / "store")
    strew(store.folder)
    for name in ("covariance-00007.safetensors", "model.safetensors", "sub/x.safetensors"):
        (store.folder / name).parent.mkdir(exist_ok=True)
        (store.folder / name).write_bytes(b"mine")
    push_store(store.folder, "me/statistics")
    files = hub.repos["datasets/me/statistics"]
    assert files.keys() == {"README.md", *store.files}
    told = capsys.readouterr().err
    assert "covariance-00000.safetensors (" in told.split("Not uploaded")[0]
    assert "covariance-00007.safetensors" in told.split("Not uploaded")[1]


def test_a_card_that_is_no_text_is_refused(hub, tmp_path):
    store = make_store(tmp_path / "store")
    (store.folder / "README.md").write_bytes(b"\xff")
    with pytest.raises(PaveError, match="README.md is not text in UTF-8"):
        push_store(store.folder, "me/statistics")
    assert not hub.created


def test_a_store_with_links_is_refused(hub, tmp_path):
    store = make_store(tmp_path / "store")
    (tmp_path / "secret").write_text("secret")
    (store.folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(PaveError, match="leads out of the folder"):
        push_store(store.folder, "me/statistics")
    assert not hub.created
