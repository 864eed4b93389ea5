"""Text that the model writes itself: sampled as it should be, kept, and used like any other."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers import (
    SPECIAL,
    assert_equal,
    crew,
    errors,
    invoke,
    merge,
    papers_formula,
    recipe,
    source_of,
    tensors_of,
    worst,
    write_tokenizer,
)

from mergekit_pave.calibration import generate as generated
from mergekit_pave.calibration.estimate import estimates
from mergekit_pave.calibration.generate import Form, form_of, generated_samples, write_rows
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.rows import open_rows
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.calibration.stores import cached_store
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.publish import record
from mergekit_pave.publish.card import write_card
from mergekit_pave.recipe.parameters import CalibrationSpec
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.storage.covariances import MANIFEST, CovarianceStore
from mergekit_pave.storage.files import cache_folder

BOS, EOS = 1, 2
CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>w1 w2{% endif %}")


def spec_of(**changes) -> CalibrationSpec:
    return CalibrationSpec(**{"dataset": "self", "num_samples": 12, **changes})


def rows_of(path: Path, resources: Resources | None = None, **changes) -> list[list[int]]:
    samples = generated_samples(source_of(path), spec_of(**changes), resources or Resources())
    return [item["input_ids"].tolist() for item in samples.items]


def forget() -> None:
    shutil.rmtree(cache_folder() / "generated")


@pytest.fixture
def path(families) -> Path:
    return families("llama")["expert0"]


@pytest.fixture
def counted(monkeypatch) -> list:
    """The calls that generate."""
    calls = []
    monkeypatch.setattr(
        generated, "write_rows", lambda *a, real=write_rows: calls.append(a) or real(*a))
    return calls


def reference(path: Path, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Second moments by weight name, float64, one whole row at a time, by plain hooks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    stacked = {name: torch.cat(inputs) for name, inputs in seen.items()}
    return {name: x.T @ x / len(x) for name, x in stacked.items()}


# --- rows ----------------------------------------------------------------------------------


def test_rows_begin_with_bos_end_with_eos_and_hold_nothing_else_of_the_kind(path):
    rows = rows_of(path, num_samples=30)
    assert len(rows) == 30 and len(set(map(tuple, rows))) == 30
    assert all(row[0] == BOS and len(row) <= 64 and EOS not in row[:-1] for row in rows)
    assert any(row[-1] == EOS for row in rows) and len(set(map(len, rows))) > 1


def test_rows_depend_on_seed_and_model_and_not_on_batch_or_count(families, path):
    rows = rows_of(path)
    forget()
    assert rows_of(path, batch_size=5) == rows
    assert rows_of(path, num_samples=7) == rows[:7]
    assert rows_of(path, seed=1) != rows
    assert rows_of(families("llama")["expert1"]) != rows
    short = rows_of(path, max_seq_length=9)
    assert short == [row[:9] for row in rows]


def test_weights_on_disk_write_the_same(path):
    rows = rows_of(path)
    forget()
    assert rows_of(path, Resources(max_memory=20_000)) == rows
    assert not list((cache_folder() / "generated").glob(".offload*"))


def test_tokens_follow_the_models_own_distribution(path, tmp_path):
    """Untouched by generation_config.json, which cuts and sharpens it for chatting."""
    sharp = tmp_path / "sharp"
    shutil.copytree(path, sharp)
    (sharp / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 0.01, "top_k": 2, "repetition_penalty": 5.0,
         "eos_token_id": EOS}))
    rows = rows_of(sharp, num_samples=3000, max_seq_length=2, batch_size=500)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[BOS]])).logits[0, -1].double()
    logits[EOS] = -torch.inf
    expected = logits.softmax(-1)
    seen = torch.bincount(torch.tensor([row[1] for row in rows]), minlength=94) / len(rows)
    # The total variation of 3,000 draws from a distribution over 93 tokens.
    assert (seen - expected).abs().sum() / 2 < 0.09
    assert (expected > 0.005).sum() > 10


@pytest.mark.parametrize("row, forced, length", [
    ([1, 9], None, None),
    ([1, 9, 9, 2], 7, None),  # the user's turn ends, the assistant's is opened
    ([1, 9, 9, 2, 7], 8, None),
    ([1, 9, 9, 2, 7, 8], None, None),
    ([1, 9, 9, 2, 7, 8, 9, 2], None, 8),
    ([1, 9, 9, 2, 7, 8, 2, 9, 9], None, 7),  # what comes after the end is not part of it
    ([1, 9, 3], None, 3),  # the end of the whole text
])
def test_turns(row, forced, length):
    form = Form((1,), (2, 7, 8), (2, 3))
    assert form.forced(row) == forced and form.length(row) == length


def _form(folder: Path, template: str | None = None, **generation) -> Form:
    write_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    config = transformers.LlamaConfig(bos_token_id=BOS, eos_token_id=EOS)
    return form_of(tokenizer, config, transformers.GenerationConfig(**generation), "it")


def test_where_rows_begin_and_end(tmp_path):
    first = len(SPECIAL)
    assert _form(tmp_path) == Form((BOS,), (), (EOS,))
    assert _form(tmp_path, eos_token_id=[9, EOS]).ends == (EOS, 9)
    user = transformers.AutoTokenizer.from_pretrained(tmp_path).unk_token_id
    chat = Form((BOS, user), (EOS, BOS, first + 1, first + 2), (EOS,), chat=True)
    assert _form(tmp_path, CHATML) == chat
    inst = "<s>w3 {{ messages[0]['content'] }} w4{% if add_generation_prompt %}{% endif %}"
    assert _form(tmp_path, inst) == Form((BOS, first + 3), (), (EOS,), chat=True)
    dated = "<s>{{ 'w3' if strftime_now('%d') == '1 January 2025' }} {{ messages[0]['content'] }}"
    assert _form(tmp_path, dated).opening == (BOS, first + 3)
    for useless in ("w1", "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"):
        assert _form(tmp_path, useless) == Form((BOS,), (), (EOS,))


def test_a_model_without_bos_begins_behind_an_end(tmp_path):
    form = _form(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.bos_token = None
    config, empty = transformers.LlamaConfig(bos_token_id=None), transformers.GenerationConfig()
    assert form_of(tokenizer, config, empty, "it") == Form((EOS,), (), form.ends)
    tokenizer.eos_token = None
    config.eos_token_id = None
    with pytest.raises(PaveError, match="it has no token that begins or ends a text"):
        form_of(tokenizer, config, empty, "it")


def test_chat_models_are_asked_and_answer(path, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(path, chat)
    (chat / "chat_template.jinja").write_text(CHATML)
    samples = generated_samples(source_of(chat), spec_of(num_samples=30), Resources())
    assert samples.notes["chat_template"]
    rows = [item["input_ids"].tolist() for item in samples.items]
    asked = [row[row.index(EOS):] for row in rows if EOS in row]
    bridge = [EOS, BOS, *(len(SPECIAL) + i for i in (1, 2))]
    whole = [part for part in asked if len(part) >= 4]
    assert whole and all(part[:4] == bridge for part in whole)
    assert any(part[-1] == EOS for part in whole)
    with pytest.raises(PaveError, match="begins a text with 2 tokens, which leave no room in the"):
        rows_of(chat, max_seq_length=2)


def test_logits_that_are_not_numbers_are_the_checkpoints_fault(path, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    model.save_pretrained(tmp_path / "bad")
    write_tokenizer(tmp_path / "bad")
    with pytest.raises(PaveError, match="lm_head.weight of bad holds NaN or Inf"):
        rows_of(tmp_path / "bad")


# --- covariances ---------------------------------------------------------------------------


def test_covariances_are_those_of_the_rows(path, tmp_path):
    store = calibrate_to(source_of(path), spec_of(), tmp_path / "s", Resources())
    rows = rows_of(path)
    assert worst(store, reference(path, rows)) < 1e-5
    data = store.manifest["data"]
    assert data["tokens"] == sum(map(len, rows)) == next(iter(store.sites.values())).count
    assert data["used"] == 12 and data["generated"] and data["dataset"] == "self"
    assert not {"split", "config", "columns"} & data.keys()
    # Second moments only: the folder may be published.
    assert all("rows" not in json.loads(f.read_text()) for f in store.folder.glob("*.json"))


def test_what_was_generated_once_is_kept(path, tmp_path, counted):
    store = cached_store(source_of(path), spec_of(), Resources())
    again = cached_store(source_of(path), spec_of(batch_size=3), Resources())
    assert again.folder == store.folder and len(counted) == 1
    calibrate_to(source_of(path), spec_of(), tmp_path / "s", Resources())
    moved = tmp_path / "moved"
    shutil.copytree(path, moved)
    assert cached_store(source_of(moved), spec_of(), Resources()).folder == store.folder
    assert len(counted) == 1
    assert cached_store(source_of(path), spec_of(seed=1), Resources()).folder != store.folder
    (moved / "chat_template.jinja").write_text(CHATML)
    assert cached_store(source_of(moved), spec_of(), Resources()).folder != store.folder
    assert len(counted) == 3


def test_text_of_a_model_that_is_replaced_meanwhile_is_not_kept(families, tmp_path, monkeypatch):
    model = shutil.copytree(families("llama")["expert0"], tmp_path / "model")
    real = generated.load_model

    def replaced(*args, **kwargs):
        shutil.copy(families("llama")["expert1"] / "model.safetensors", model)
        return real(*args, **kwargs)

    monkeypatch.setattr(generated, "load_model", replaced)
    with pytest.raises(PaveError, match="were written anew while they were read"):
        generated_samples(source_of(model), CalibrationSpec("self", num_samples=2), Resources())
    assert not list((cache_folder() / "generated").glob("*.json"))


def test_damaged_text_is_named(path):
    rows_of(path)
    (file,) = (cache_folder() / "generated").glob("*.json")
    file.write_text("{")
    with pytest.raises(PaveError, match=f"{file.name} cannot be read .*; delete it"):
        rows_of(path)


def _calibrate(workers, path: Path, folder: Path, cache: Path) -> bool:
    # The server that forks the processes has the environment of the test that started it.
    os.environ["MERGEKIT_PAVE_CACHE"] = str(cache)
    return calibrate_to(source_of(path), spec_of(), folder, Resources(), workers) is not None


def test_several_processes_share_what_the_main_one_generates(path, tmp_path):
    assert crew(2, _calibrate, path, tmp_path / "s", cache_folder()) == [True, False]
    assert len(list((cache_folder() / "generated").glob("*.json"))) == 1
    forget()
    one = calibrate_to(source_of(path), spec_of(), tmp_path / "one", Resources())
    assert_equal(CovarianceStore(tmp_path / "s"), one)


# --- in a merge ----------------------------------------------------------------------------


@pytest.fixture
def config(families) -> dict:
    raw = recipe(families("llama"), ["self", "self"], num_calibration_samples=12)
    return {**raw, "dtype": "float32"}


def test_a_merge_generates_once_and_purifies_by_it(families, config, tmp_path, counted):
    del config["models"][1]
    config["models"][0]["parameters"]["weight"] = 1.0
    merged = merge(config, tmp_path / "out")
    path = families("llama")["expert0"]
    expert, covariances = tensors_of(path), reference(path, rows_of(path))
    for name, covariance in covariances.items():
        if name != "lm_head.weight":
            expected = papers_formula(expert[name], covariance, 0.9)
            assert (merged[name] - expected).norm() < 1e-4 * (expert[name] - expected).norm()
    again = merge(config, tmp_path / "again")
    assert len(counted) == 1 and all(torch.equal(again[name], merged[name]) for name in merged)


def test_record_and_card_say_who_wrote_it(config, tmp_path):
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    out, source = tmp_path / "out", yaml.safe_dump(config)
    mergekit.merge.run_merge(
        MergeConfiguration.model_validate(config), str(out),
        MergeOptions(quiet=True, copy_tokenizer=False), source)
    kept = record.read(out)
    assert all(model.data["generated"] for model in kept.models)
    text = write_card(out)
    assert text.count("| self (generated by the model itself) | 12 | ") == 2
    assert "datasets:" not in text and "datasets/self" not in text


def test_check_opens_no_dataset_and_says_how_much_is_generated(config):
    assert errors(config) == []
    (line, _) = estimates(Recipe.of(config), LoaderOptions())
    assert line.endswith(f"at most {12 * 64:,} tokens to generate before the first pass.")


@pytest.mark.parametrize("kind, name", [
    ("bert", "BertModel"), ("t5", "T5ForConditionalGeneration"),
    ("roberta", "RobertaForSequenceClassification"), ("vit", "ViTForImageClassification")])
def test_other_models_are_refused(families, tmp_path, kind, name):
    paths = families(kind)
    wanted = (
        "calibration_dataset: self needs a causal language model; {} is a "
        f"{name}: name a dataset or use none.")
    found = errors({**recipe(paths, ["self", "self"]), "dtype": "float32"})
    assert found == [
        f"models[{i}]: " + wanted.format(paths[f"expert{i}"]) for i in range(2)]
    code, _, err = invoke("calibrate", paths["expert0"], "--dataset", "self", "-o", tmp_path / "s")
    assert code == 1 and wanted.format("expert0") in err and not (tmp_path / "s").exists()


# --- the command ---------------------------------------------------------------------------


def test_calibrate_with_the_models_own_text(path, tmp_path):
    code, out, err = invoke("calibrate", path, "--dataset", "self", "--num-calibration-samples", 8,
                            "-o", tmp_path / "s")
    assert code == 0 and (tmp_path / "s" / MANIFEST).exists()
    assert "8 covariances for 14 weights" in out and "Generating text of expert0: 100%" in err


def test_a_folder_of_that_name_is_a_path(path, tmp_path, monkeypatch, counted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "data.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 3)
    for number, name in enumerate(("./self", "self")):
        assert invoke("calibrate", path, "--dataset", name, "--num-calibration-samples", 3,
                      "-o", tmp_path / str(number))[0] == 0
        data = json.loads((tmp_path / str(number) / MANIFEST).read_text())["data"]
        assert data["local"] is (name == "./self") and len(counted) == number


def test_there_are_no_rows_to_open():
    with pytest.raises(PaveError, match="text that a model generates.*a folder called self as"):
        open_rows(spec_of())
