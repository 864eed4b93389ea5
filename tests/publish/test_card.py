"""The model card: what it adds, what it takes out, and that it can be written again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from helpers import make_store
from helpers.cards import BEGIN, HUB, MATH, kept, make_output, recorded_as, texts_of
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from mergekit.common import ModelReference

from mergekit_pave.cli.folders import card_command
from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import name_of
from mergekit_pave.plugin import register
from mergekit_pave.publish import card, record
from mergekit_pave.publish import scrub as public
from mergekit_pave.publish.card import write_card

register()


def test_metadata(tmp_path):
    out = make_output(tmp_path / "out", HUB)
    before = ModelCard.load(out / "README.md").data
    assert "pave" not in before.tags
    write_card(out)
    data = ModelCard.load(out / "README.md").data
    assert data.tags == ["mergekit", "merge", "pave"]
    assert data.base_model == [
        "meta-llama/Llama-2-7b-hf", "WizardLMTeam/WizardMath-7B-V1.0",
        "RedHatAI/Llama-2-7b-evolcodealpaca"]
    assert data.base_model_relation == "merge"
    assert data.datasets == ["openai/gsm8k"]
    assert data.library_name == "transformers"
    assert metadata_load(out / "README.md") == data.to_dict()
    assert ModelCard(str(ModelCard.load(out / "README.md"))).data.to_dict() == data.to_dict()


def test_data_that_the_merge_looked_at(tmp_path):
    text = write_card(make_output(tmp_path / "out", HUB))
    assert "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k), main, train" in text
    assert "| code.jsonl (not published), train | 128 | - | - |" in text
    assert "2510.14697" in text and "(`rank_ratio`): 0.98" in text
    assert "0.01 of the mean diagonal" in text


LOCAL = """\
# tried first with {home}/drafts/first.yml, see ../notes/todo.md and C:\\Users\\somebody\\plan.txt
merge_method: pave_ties
base_model: {root}/models/base
models:
  - model: {root}/models/math expert
    parameters:
      calibration_dataset: "{root}/private data/math.jsonl"
  - model: meta-llama/Llama-2-7b-hf+{root}/models/adapter
    parameters: {{covariance: ../stores/code-statistics/}}
  - model: ~/models/other
    parameters: {{calibration_dataset: /srv/corpora/deep/rows, rank_ratio: 0.9}}
  - model: {home}
    parameters: {{calibration_dataset: openai/gsm8k, text_column: "question,answer"}}
tokenizer:
  source: {root}/models/base
"""


def test_no_local_path_is_left(tmp_path, monkeypatch):
    home = tmp_path / "home" / "somebody"
    monkeypatch.setenv("HOME", str(home))
    out = make_output(tmp_path / "out", LOCAL.format(root=home / "work", home=home))
    assert "somebody" in texts_of(out)
    text = write_card(out)
    for secret in (str(tmp_path), "somebody", "private data", "corpora", "../", "~/", "drafts/"):
        assert secret not in texts_of(out), secret
    source = (out / "mergekit_config.yml").read_text("utf-8")
    raw = yaml.safe_load(source)
    assert raw["base_model"] == "base" and raw["tokenizer"]["source"] == "base"
    assert [model["model"] for model in raw["models"]] == [
        "math expert", "meta-llama/Llama-2-7b-hf+adapter", "other", "local"]
    assert raw["models"][0]["parameters"]["calibration_dataset"] == "math.jsonl"
    assert raw["models"][1]["parameters"]["covariance"] == "code-statistics"
    assert raw["models"][3]["parameters"]["text_column"] == "question,answer"
    assert "#" not in source, "comments may hold paths"
    assert source in text
    data = ModelCard(text).data
    assert data.base_model == ["meta-llama/Llama-2-7b-hf"]
    assert data.datasets == ["openai/gsm8k"]


def test_only_local_models_have_no_parents(tmp_path):
    source = "merge_method: pave_ties\nbase_model: /m/base\nmodels: [{model: /m/a}]\n"
    data = ModelCard(write_card(make_output(tmp_path / "out", source))).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()


@pytest.mark.parametrize("source", [HUB, LOCAL.format(root="/home/a/b", home="/home/a")])
def test_writing_again_changes_nothing(tmp_path, source):
    out = make_output(tmp_path / "out", source)
    write_card(out)
    once = texts_of(out)
    write_card(out)
    assert texts_of(out) == once


def test_record_of_a_merge(tmp_path):
    out = make_output(tmp_path / "out", HUB)
    state = kept(tmp_path, **{"WizardLMTeam__WizardMath-7B-V1.0": {"a": (100, 10), "b": (300, 2)}})
    recorded_as(out, state)
    facts = record.read(out)
    assert facts.tensors == record.Counts(purified=2, plain=1)
    assert facts.models[0].hub == ("WizardLMTeam/WizardMath-7B-V1.0",)
    assert facts.models[0].ranks == {"a": (100, 10), "b": (300, 2)}
    text = write_card(out)
    assert "97.00% (90.00% to 99.33% per tensor)" in text
    assert "| RedHatAI" not in text  # its weight was 0, or all of it equal to the base's
    assert "2 tensors were purified, 1 merged plainly" in text
    assert "fewer tokens than features (least: 0.5 tokens per feature)" in text


def test_a_record_of_another_merge_is_none_of_this_one(tmp_path):
    out = make_output(tmp_path / "out", HUB)
    recorded_as(out, kept(tmp_path, **MATH), merge_method="pave_task_arithmetic")
    with pytest.raises(PaveError, match="has no record of this merge"):
        write_card(out)


def test_what_was_local_to_the_merge_is_so_from_elsewhere(tmp_path, monkeypatch):
    """`experts/math` looks like a Hub id where there is no such folder."""
    for name in ("base", "experts/math", "experts/code"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    out = make_output(tmp_path / "out", """\
merge_method: regmean
base_model: base
models:
  - model: experts/math
    parameters: {calibration_dataset: rows/math}
  - model: org/code
    parameters: {calibration_dataset: openai/gsm8k}
""")
    # mergekit asked the Hub, where somebody has a model of that name.
    card = ModelCard.load(out / "README.md")
    card.data.base_model = ["experts/math", "org/code"]
    card.save(out / "README.md")
    state = kept(tmp_path / "stores", experts__math={}, org__code={})
    local = make_store(tmp_path / "local", dataset="math", local=True)
    state.used[ModelReference.model_validate("experts/math")] = local
    recorded_as(out, state)
    monkeypatch.chdir(out)
    data = ModelCard(write_card(".")).data
    assert data.base_model == ["org/code"] and data.datasets == ["openai/gsm8k"]
    assert "experts/math" not in texts_of(out) and "rows/math" not in texts_of(out)
    raw = yaml.safe_load((out / "mergekit_config.yml").read_text("utf-8"))
    assert [model["model"] for model in raw["models"]] == ["math", "org/code"]


def test_data_named_beside_a_store_keeps_its_name(tmp_path):
    """The store is of other data; what nobody read is no local name for that."""
    out = make_output(tmp_path / "out", """\
merge_method: regmean
base_model: org/base
models:
  - model: org/math
    parameters: {covariance: org/store, calibration_dataset: openai/gsm8k}
""")
    state = kept(tmp_path / "stores", org__math={})
    state.used[ModelReference.model_validate("org/math")] = make_store(
        tmp_path / "other", dataset="org/other")
    recorded_as(out, state)
    write_card(out)
    assert "calibration_dataset: openai/gsm8k" in (out / "mergekit_config.yml").read_text("utf-8")


def test_the_users_own_words_stay(tmp_path):
    out = make_output(tmp_path / "out", HUB)
    card = ModelCard(write_card(out))
    card.data.license = "llama2"
    card.data.datasets = ["me/extra"]
    card.text = card.text.replace("# out", "# My best merge") + "\nEvaluated with care.\n"
    card.save(out / "README.md")
    text = write_card(out)
    assert "# My best merge" in text and text.endswith("Evaluated with care.\n")
    assert text.count(BEGIN) == 1
    data = ModelCard(text).data
    assert data.license == "llama2" and data.datasets == ["me/extra", "openai/gsm8k"]


def test_figure_beside_the_model(tmp_path):
    out = make_output(tmp_path / "out", HUB)
    assert "![" not in write_card(out)
    (out / "report" / "figures").mkdir(parents=True)
    (out / "report" / "figures" / "spectra.png").write_bytes(b"")
    assert "](report/figures/spectra.png)" in write_card(out)


@pytest.mark.parametrize(("damage", "complaint"), [
    (lambda out: (out / "README.md").unlink(), "has no README.md"),
    (lambda out: (out / "mergekit_config.yml").unlink(), "has no mergekit_config.yml"),
    (lambda out: (out / "mergekit_config.yml").write_text("- 1\n"), "holds no merge config"),
    (lambda out: (out / "mergekit_config.yml").write_text("a: ["), "is not YAML"),
    (lambda out: (out / "README.md").write_text("---\n- a\n---\n"), "is broken"),
    (lambda out: (out / "README.md").write_text("---\na: [\n---\n"), "is broken"),
    (lambda out: (out / record.NAME).write_text("{}"), "is damaged"),
    (lambda out: (out / record.NAME).unlink(), "has no record of this merge"),
    (lambda out: (out / "mergekit_config.yml").write_text(HUB.replace("pave_", "")),
     "merged with ties, which is no method of mergekit-pave"),
])
def test_refusals(tmp_path, damage, complaint):
    out = make_output(tmp_path / "out", HUB)
    damage(out)
    before = texts_of(out)
    with pytest.raises(PaveError, match=complaint):
        write_card(out)
    assert texts_of(out) == before


def test_command(tmp_path):
    out = make_output(tmp_path / "out", HUB)
    result = CliRunner().invoke(card_command, [str(out)])
    assert result.exit_code == 0, result.output
    assert BEGIN in (out / "README.md").read_text("utf-8")
    assert json.loads((out / record.NAME).read_text("utf-8"))["format"] == 1
    result = CliRunner().invoke(card_command, [str(out), "--private"])
    assert result.exit_code == 1 and "--push" in result.output


@pytest.mark.parametrize(("path", "name"), [
    ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
    ("gpt2", "gpt2"),
    ("https://host/data.jsonl", "https://host/data.jsonl"),
    ("/a/b/", "b"),
    ("~/x/y.jsonl", "y.jsonl"),
    ("./models/a", "a"),
    ("a/b/c", "c"),
    ("rows.jsonl", "rows.jsonl"),
    ("C:\\data\\x", "x"),
    ("file:///srv/x.jsonl", "x.jsonl"),
    ("/home/somebody", "local"),
    ("~", "local"),
    ("/", "local"),
    ("/models/123", "./123"),
])
def test_public_names(path, name):
    assert name_of(path) == name
    assert name_of(name) == name


LINKS = """\
![plot](./figures/plot.png) and <img src="../a.png">, [notes](./docs/notes.md)
from /r/LocalLLaMA/comments at 5 tokens /s/GPU
"""


def test_the_users_links_stay(tmp_path):
    out = make_output(tmp_path / "out", LOCAL.format(root="/srv/work", home="/home/a"))
    with (out / "README.md").open("a") as card:
        card.write(LINKS)
    text = write_card(out)
    assert LINKS in text and "/srv" not in text and "/home/a" not in text


@pytest.mark.parametrize("text", [
    "see https://huggingface.co/a/b/c and [this](https://arxiv.org/abs/1)", "either/or, 1/2/3",
    "</details>", "TIES / DARE", "model.layers/0", "100 MB/s"])
def test_scrub_leaves_the_rest(text):
    assert public.scrub_card(text, {}) == text
    assert public.scrub_card(f"```yaml\n{text}\n```", {}) == f"```yaml\n{text}\n```"


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ 'Q:\\n' + m.content }}{% endfor %}",
    "  {{ 'see /opt/x/y' }}\n  {# ~/a/b #}\n", "C:\\a and /etc/x/y {{ messages }}"])
def test_a_chat_template_is_kept_as_it_is(template):
    raw = {"merge_method": "ties", "chat_template": template, "dtype": "float32"}
    assert yaml.safe_load(public.scrub_configuration(raw)) == raw
    source = f"# from /srv/a/b\n{yaml.safe_dump(raw)}"
    text = public.scrub_card(f"see\n```yaml\n{source}```\n/srv/a/b", raw)
    assert text == f"see\n```yaml\n{public.scrub_configuration(raw)}```\n/srv/a/b"


def test_paths_that_are_odd_in_yaml_are_cut_to_their_names():
    raw = {"base_model": "/srv/my models/a b/null", "models": [{"model": "./x/1e3: y"}]}
    text = public.scrub_configuration(raw)
    assert yaml.safe_load(text) == {"base_model": "./null", "models": [{"model": "./1e3: y"}]}


def test_a_card_that_is_cut_short_is_completed_by_the_next_run(tmp_path, monkeypatch):
    source = LOCAL.format(root="/home/a/b", home="/home/a")
    out = make_output(tmp_path / "out", source)
    expected = write_card(make_output(tmp_path / "whole" / "out", source))
    write = card.write_text

    def failing(path, *rest):
        if path.name == "mergekit_config.yml":
            raise OSError("disk full")
        write(path, *rest)

    monkeypatch.setattr(card, "write_text", failing)
    with pytest.raises(OSError, match="disk full"):
        write_card(out)
    monkeypatch.undo()
    monkeypatch.setenv("HOME", "/home/a")
    assert write_card(out) == expected and "/home/a" not in texts_of(out)


@pytest.mark.parametrize(("parameters", "words"), [
    ("{}", ["from its weight.", "(`rank_ratio`): 0.98;"]),
    ("{purify: delta}", ["from its difference from the base", "(`rank_ratio`): 0.25;"]),
    ("{purify: delta, rank_ratio: 0.5}", ["(`rank_ratio`): 0.5;"]),
    ("{purify: separate}", ["rather than the others'", "(`separation`): 1 / (models - 1);"]),
    ("{purify: separate, separation: 2}", ["(`separation`): 2;"]),
    ("{purify: [{filter: mlp, value: delta}, {value: weight}]}", ["as the configuration says"]),
])
def test_the_card_says_what_was_purified(tmp_path, parameters, words):
    source = HUB.replace("{rank_ratio: 0.98}", parameters)
    out = make_output(tmp_path / "out", source)
    recorded_as(out, kept(tmp_path, **MATH))
    text = write_card(out)
    assert all(word in text for word in words)
    assert "None" not in text


def test_covariances_without_data_are_called_so(tmp_path):
    source = HUB.replace("code.jsonl", "none")
    out = make_output(tmp_path / "out", source)
    last = ModelReference.model_validate("RedHatAI/Llama-2-7b-evolcodealpaca")
    state = SimpleNamespace(counts={"purified": {"a"}, "plain": set()}, used={}, ranks={},
                            data_free={last})
    recorded_as(out, state)
    said = "none (covariances estimated from the task vector)"
    assert f"| {last} | {said} | - | - | - |" in write_card(out)
    assert "none" not in metadata_load(out / "README.md").get("datasets", [])
