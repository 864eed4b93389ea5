"""Publishing, against a small stand-in for the Hub that answers over HTTP on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import make_store
from huggingface_hub import DatasetCard, constants

from mergekit_pave.cli.folders import card_command, publish_command
from mergekit_pave.errors import PaveError
from mergekit_pave.models.headers import check_finished
from mergekit_pave.publish.hub import check_target, push_merge, push_store
from mergekit_pave.publish.store_card import store_card
from mergekit_pave.storage.covariances import CovarianceStore


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("large", [True, False])
def test_push_merge(hub, out, large):
    hub.large = large
    (out / ".DS_Store").write_bytes(b"x")
    (out / ".model.safetensors.12.tmp").write_bytes(b"x")
    assert push_merge(out, "me/merge") == f"{hub.endpoint}/me/merge"
    files = hub.repos["models/me/merge"]
    assert files == {n: d for n, d in contents(out).items() if not n.startswith(".")}
    assert b"mergekit-pave: begin" in files["README.md"]
    assert bool(hub.objects) is large
    assert "visibility" not in hub.created[0] and "private" not in hub.created[0]


def test_push_again_to_the_same_repository(hub, out):
    push_merge(out, "me/merge")
    (out / "config.json").write_text((out / "config.json").read_text("utf-8") + "\n")
    push_merge(out, "me/merge")
    assert hub.repos["models/me/merge"] == contents(out)


def test_push_private(hub, out):
    result = CliRunner().invoke(card_command, [str(out), "--push", "me/merge", "--private"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"{hub.endpoint}/me/merge"
    assert "private" in (hub.created[0].get("visibility"), *hub.created[0])


def test_push_through_the_environment_only(hub, out):
    """As users do it: another process, `HF_ENDPOINT` and `HF_TOKEN`."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_OFFLINE": "0"}
    command = "from mergekit_pave.cli.folders import card_command as c; c()"
    done = subprocess.run(
        [sys.executable, "-c", command, str(out), "--push", "me/merge"],
        env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.repos["models/me/merge"] == contents(out)


def test_push_store(hub, tmp_path):
    store = make_store(tmp_path / "store", model="a/expert")
    (tmp_path / "store" / "calibration.json").write_text("{}")
    url = push_store(tmp_path / "store", "me/statistics", private=True)
    assert url == f"{hub.endpoint}/datasets/me/statistics"
    files = hub.repos["datasets/me/statistics"]
    assert files.keys() == {"README.md", "manifest.json", "fingerprints.safetensors",
                            "covariance-00000.safetensors"}
    assert b"covariance: me/statistics" in files["README.md"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in files.items():
        (copy / name).write_bytes(data)
    assert CovarianceStore(copy).covariance("a.weight").equal(store.covariance("a.weight"))


def test_publish_command(hub, tmp_path):
    make_store(tmp_path / "store")
    command = [str(tmp_path / "store"), "me/statistics", "--private"]
    result = CliRunner().invoke(publish_command, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"{hub.endpoint}/datasets/me/statistics"
    assert hub.created[0]["type"] == "dataset"


def test_push_store_keeps_the_users_card(hub, tmp_path):
    make_store(tmp_path / "store")
    text = "---\nlicense: mit\n---\n# Mine\n"
    (tmp_path / "store" / "README.md").write_text(text)
    push_store(tmp_path / "store", "me/statistics")
    assert hub.repos["datasets/me/statistics"]["README.md"] == text.encode()


def test_the_card_of_another_try_is_not_the_users(hub, tmp_path):
    make_store(tmp_path / "store")
    push_store(tmp_path / "store", "me/first")
    push_store(tmp_path / "store", "me/second")
    card = hub.repos["datasets/me/second"]["README.md"].decode()
    assert "covariance: me/second" in card and "me/first" not in card


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b/c", "me/na me", "me/a--b", "", "../x"])
def test_bad_repository(hub, out, name):
    with pytest.raises(PaveError, match="is no repository id"):
        push_merge(out, name)
    assert not hub.created


def test_nobody_logged_in(hub, out, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    before = contents(out)
    with pytest.raises(PaveError, match="hf auth login"):
        push_merge(out, "me/merge")
    assert contents(out) == before and not hub.created
    assert check_target("me/merge", "hf_given") == "hf_given"


def test_token_that_may_not_write(hub, out):
    with pytest.raises(PaveError, match="may not write to me/merge"):
        push_merge(out, "me/merge", token="hf_read")


def test_offline(hub, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PaveError, match="HF_HUB_OFFLINE is set"):
        push_merge(out, "me/merge")


def test_hub_out_of_reach(hub, out, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PaveError, match="me/merge failed .*try again with `mergekit-pave card"):
        push_merge(out, "me/merge")


@pytest.mark.parametrize(("damage", "complaint"), [
    (lambda out: (out / "config.json").unlink(), "no config.json"),
    (lambda out: [path.unlink() for path in out.glob("model*")], "has no weights"),
    (lambda out: next(out.glob("*.safetensors")).unlink(), "is missing"),
    (lambda out: (out / "model.safetensors.index.json").write_text("{}"), "is no index"),
    (lambda out: _cut(next(out.glob("*.safetensors"))), "is cut short"),
])
def test_unfinished_merge(hub, out, damage, complaint):
    damage(out)
    with pytest.raises(PaveError, match=complaint):
        push_merge(out, "me/merge")
    assert not hub.created


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_single_file_is_a_finished_merge(families):
    check_finished(families("llama")["expert0"])


def test_unfinished_store(hub, tmp_path):
    make_store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(PaveError, match="No covariance store"):
        push_store(tmp_path / "store", "me/statistics")
    assert not hub.created


# --- the card of a store -------------------------------------------------------------------


def test_store_card(tmp_path):
    text = store_card(make_store(tmp_path / "s", model="a/expert"), "me/statistics")
    card = DatasetCard(text)
    assert card.data.to_dict()["tags"] == ["pave", "mergekit", "covariance"]
    assert card.data.to_dict()["viewer"] is False
    assert DatasetCard(str(card)).content == card.content == text
    for part in ("a/expert", "`openai/gsm8k`, config main, split train, seed 42", "12,345",
                 "1 of 64 x 64", "covariance: me/statistics", "membership inference", "licence"):
        assert part in text


def test_store_card_names_no_local_data(tmp_path):
    text = store_card(make_store(tmp_path / "s", dataset="patients.jsonl", local=True))
    assert "patients" not in text and "not published" in text


@pytest.mark.parametrize(("rows", "warning"), [
    (32, "1 of the 1 covariances come from fewer tokens than"),
    (128, "has 2.0 tokens per feature. That is few"),
    (6400, "at least 100 tokens per feature"),
])
def test_store_card_says_what_can_leak(tmp_path, rows, warning):
    assert warning in store_card(make_store(tmp_path / "s", rows=rows))


def test_calibrate_pushes_what_it_has_written(hub, families, texts, tmp_path):
    from mergekit_pave.cli import main

    command = ["calibrate", str(families("llama")["expert0"]), "--dataset", str(texts[0]),
               "-o", str(tmp_path / "store"), "--push"]
    refused = CliRunner().invoke(main, [*command, "not a name"])
    assert refused.exit_code == 1 and "write USER/NAME" in refused.output
    assert not (tmp_path / "store").exists()
    done = CliRunner().invoke(main, [*command, "me/stats", "--private"])
    assert done.exit_code == 0, done.output
    assert "datasets/me/stats" in done.output
    published = hub.repos["datasets/me/stats"]
    assert {"manifest.json", "README.md", "fingerprints.safetensors"} <= published.keys()
