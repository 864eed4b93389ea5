"""Records, configurations, cards and indices of strangers: read, or refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml
from helpers import make_store
from helpers.damage import ANYTHING, WHOLE, changed, places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_pave.errors import PaveError
from mergekit_pave.publish.card import write_card
from mergekit_pave.publish.hub import merge_files
from mergekit_pave.publish.store_card import store_card
from mergekit_pave.recipe.reading import read_yaml
from mergekit_pave.storage.covariances import CovarianceStore

MANY = settings(max_examples=150, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
FILES = ("pave_report.json", "mergekit_config.yml", "README.md", "config.json",
         "model.safetensors.index.json", "tokenizer_config.json")


def written_or_refused(out) -> None:
    for command in (merge_files, write_card):
        try:
            command(out)
        except PaveError as error:
            assert "\n" not in str(error)


@pytest.fixture
def rich(out):
    """A merge with a record that says all that one can say."""
    record = json.loads((out / "pave_report.json").read_text())
    for model in record["models"]:
        model["ranks"] = {"a": [9, 1]}
        model["statistics"] = {"sites": 2, "rows_per_feature": 0.5, "skipped": {"why": 1}}
        model["data"] |= {"tokens": 7, "columns": ["text"], "generated": False}
    (out / "pave_report.json").write_text(json.dumps(record))
    (out / "tokenizer_config.json").write_text('{"name_or_path": "/x/y", "auto_map": {}}')
    return out


@MANY
@given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_any_value_in_any_place(rich, name, data):
    folder = rich.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(rich, folder)
    file = folder / name
    text, rest = file.read_text("utf-8"), ""
    if name == "README.md":
        _, text, rest = text.split("---", 2)
    values = yaml.safe_load(text)
    new = changed(values, data.draw(st.sampled_from(list(places(values)))), data.draw(ANYTHING))
    dump = json.dumps(new) if name.endswith("json") else yaml.dump(new, allow_unicode=True)
    dump = dump.encode("utf-8", "replace")
    file.write_bytes(b"---\n" + dump + b"---" + rest.encode() if rest else dump)
    written_or_refused(folder)


@pytest.mark.parametrize("content", WHOLE, ids=range(len(WHOLE)))
@pytest.mark.parametrize("name", FILES)
def test_another_file_in_the_place_of_ours(rich, name, content):
    (rich / name).write_bytes(content)
    written_or_refused(rich)


@pytest.mark.parametrize("name", FILES)
def test_pipes_are_not_waited_for(rich, name):
    (rich / name).unlink()
    os.mkfifo(rich / name)
    written_or_refused(rich)


def test_aliases_that_multiply(rich):
    bomb = "k0: &k0 [1]\n" + "".join(
        f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]\n" for i in range(1, 12))
    file = rich / "mergekit_config.yml"
    file.write_text(file.read_text("utf-8") + bomb, "utf-8")
    with pytest.raises(PaveError, match="stands for more than 1,000,000 values"):
        write_card(rich)
    for text in (bomb, "a: &a [*a]"):
        with pytest.raises(PaveError, match="stands for more than"):
            read_yaml(text)


@MANY
@given(data=st.data())
def test_a_store_with_any_value_has_a_card_or_none(tmp_path_factory, data):
    folder = make_store(tmp_path_factory.mktemp("s") / "store").folder
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    place = data.draw(st.sampled_from([p for p in places(manifest) if p[:1] in (
        ("data",), ("model",), ("skipped",))]))
    path.write_text(json.dumps(changed(manifest, place, data.draw(ANYTHING))), "utf-8")
    try:
        store_card(CovarianceStore(folder))
    except PaveError:
        pass
