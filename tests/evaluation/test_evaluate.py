"""`mergekit-pave evaluate`: rows, scores and sentences, against direct computations."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from helpers import recipe, write_texts

from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.samples import digest_of, load_samples
from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.bench import Bench
from mergekit_pave.evaluation.held_out import given, held_out
from mergekit_pave.evaluation.intervals import interval
from mergekit_pave.evaluation.run import evaluate
from mergekit_pave.evaluation.scores import TOP, kind_of, reference, score
from mergekit_pave.evaluation.setup import RowOptions, bench_of
from mergekit_pave.evaluation.verdict import doubt, sentence, verdicts
from mergekit_pave.models.source import LoaderOptions, ModelSource
from mergekit_pave.plugin import register
from mergekit_pave.recipe.parameters import CalibrationSpec
from mergekit_pave.recipe.recipe import Recipe


def _source(path) -> ModelSource:
    return ModelSource(str(path), path.name, str(path))


def _bench(families, texts, kind: str, method="pave_task_arithmetic", **wanted) -> Bench:
    register()
    made = Recipe.of(recipe(families(kind), texts, method))
    return bench_of(made, RowOptions(rows=12, **wanted), LoaderOptions(), Resources(), quiet=True)


def test_held_out_rows_are_those_that_calibration_does_not_draw(families, texts):
    path = families("llama")["expert0"]
    spec = CalibrationSpec(str(texts[0]), num_samples=20)
    drawn = load_samples(spec, path, transformers.AutoConfig.from_pretrained(path))
    rows = held_out(_source(path), spec, 100, 64)
    names = {digest_of(item) for item in rows.items}
    assert len(names) == 40
    assert not names & {digest_of(item) for item in drawn.items}
    assert rows.digest == held_out(_source(path), spec, 100, 64).digest
    free = held_out(_source(path), spec, 100, 64, drawn=False)
    assert {digest_of(item) for item in free.items} == names | {digest_of(i) for i in drawn.items}
    assert free.digest != rows.digest


def test_language_scores_are_those_of_float64(families, texts):
    paths = families("llama")
    rows = held_out(_source(paths["expert0"]), CalibrationSpec(str(texts[0])), 6, 64, drawn=False)
    expert, base = (
        transformers.AutoModelForCausalLM.from_pretrained(paths[name]).eval()
        for name in ("expert0", "base"))
    found = score(base, "language", rows.items, reference(expert, "language", rows.items)[0])
    whole = []
    for i, item in enumerate(rows.items):
        ids = item["input_ids"][None]
        with torch.no_grad():
            p, q = (m.double()(ids).logits[0, :-1].log_softmax(-1) for m in (expert, base))
        loss = -q[torch.arange(len(q)), ids[0, 1:]].mean().item()
        assert found["loss"][i] == pytest.approx(loss, rel=1e-5)
        top = p.topk(TOP).indices
        cut = [torch.cat([x.gather(-1, top), _others(x, top)], -1) for x in (p, q)]
        kl = (cut[0].exp() * (cut[0] - cut[1])).sum(-1).mean().item()
        assert found["kl"][i] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        whole.append((p.exp() * (p - q)).sum(-1).mean().item())
        same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        assert found["agreement"][i] == same
    # What is cut down never looks further away than it is.
    assert (found["kl"] <= np.array(whole) * (1 + 1e-3)).all()
    assert found["kl"].mean() > 0.5 * np.mean(whole)


def _others(logp, top):
    return logp.scatter(-1, top, -torch.inf).exp().sum(-1, keepdim=True).log()


def test_classifier_scores_are_those_of_float64(families, texts):
    paths = families("roberta")
    rows = held_out(_source(paths["expert0"]), CalibrationSpec(str(texts[0])), 6, 64, drawn=False)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    expert, base = (load(paths[name]).eval() for name in ("expert0", "base"))
    said = reference(expert, "classifier", rows.items)[0]
    labels = [i % 3 for i in range(6)]
    found = score(base, "classifier", rows.items, said, labels)
    for i, item in enumerate(rows.items):
        with torch.no_grad():
            p, q = (m.double()(item["input_ids"][None]).logits[0].log_softmax(-1)
                    for m in (expert, base))
        assert found["kl"][i] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-2)
        assert found["agreement"][i] == (p.argmax() == q.argmax())
        assert found["accuracy"][i] == (q.argmax() == labels[i])


@pytest.mark.parametrize("kind", ["llama", "roberta", "bert", "t5"])
def test_the_expert_keeps_everything_and_the_base_nothing(families, texts, kind):
    bench = _bench(families, texts, kind)
    for model, share in (("expert0", 1), ("base", 0)):
        first = verdicts(bench, bench.of(_source(families(kind)[model])))[0]
        assert first.measure
        assert first.kept.value == pytest.approx(share, abs=1e-9)
        assert first.kept.low == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("kind", ["llama", "roberta", "bert"])
def test_an_experts_own_scores_come_with_its_reference(families, texts, kind):
    bench = _bench(families, texts, kind)
    task = bench.tasks[0]
    model = transformers.AutoModel if task.kind == "encoder" else transformers.AutoModelForCausalLM
    model = (transformers.AutoModelForSequenceClassification if task.kind == "classifier"
             else model).from_pretrained(task.source.path)
    said, own = reference(model, task.kind, task.rows.items, task.rows.labels)
    wanted = score(model, task.kind, task.rows.items, said, task.rows.labels)
    assert own.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(own[name], values, atol=1e-6)


def test_an_expert_that_is_no_better_than_the_base_on_its_rows_is_doubted():
    loss = np.linspace(1, 2, 20)
    close = {"loss": loss, "kl": np.zeros(20)}
    base = {"loss": loss - 0.1, "kl": np.ones(20)}
    said = "rows of math the expert (token loss 1.5) is not measurably better than the base (1.4)"
    assert said in doubt("math", "language", close, base)
    assert doubt("math", "language", base, {**close, "kl": np.ones(20)}) is None
    assert doubt("math", "classifier", close, base) is None


def test_encoder_distance_is_that_of_float64(families, texts):
    bench = _bench(families, texts, "bert")
    found = bench.bases()[0]["distance"]
    models = [transformers.AutoModel.from_pretrained(families("bert")[n]).double().eval()
              for n in ("expert0", "base")]
    with torch.no_grad():
        e, b = (np.array([
            model(**{name: value[None] for name, value in item.items()})
            .last_hidden_state[0].mean(0).numpy() for item in bench.tasks[0].rows.items])
            for model in models)
    e, b = e - e.mean(0), b - e.mean(0)
    cosine = (e * b).sum(1) / np.linalg.norm(e, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found, 1 - cosine, rtol=1e-4)


def test_a_classifier_is_scored_under_the_experts_own_head(families, texts, tmp_path):
    paths = families("roberta")
    other = tmp_path / "expert1"
    shutil.copytree(paths["expert1"], other)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        other, num_labels=5, ignore_mismatched_sizes=True)
    model.save_pretrained(other)
    bench = _bench(lambda kind: {**paths, "expert1": other}, texts, "roberta")
    # The merged model is the second expert's body under the first one's head.
    second = verdicts(bench, bench.of(_source(paths["expert1"])))[1]
    assert second.kept.value == pytest.approx(1, abs=1e-6)


def test_scores_come_from_the_cache(families, texts, monkeypatch):
    first = _bench(families, texts, "llama").of(_source(families("llama")["base"]))
    monkeypatch.setattr(Bench, "_score", None)
    second = _bench(families, texts, "llama").of(_source(families("llama")["base"]))
    assert all((a[name] == b[name]).all() for a, b in zip(first, second, strict=True) for name in a)


def test_intervals_are_seeded_and_paired():
    rows = np.arange(50.0)
    ratio = interval(lambda a, b: a / b, [rows, 2 * rows])
    assert (ratio.value, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
    mean = interval(lambda a: a, [rows])
    assert mean == interval(lambda a: a, [rows])
    # Of a mean: 1.96 standard errors to either side.
    error = rows.std() / np.sqrt(len(rows))
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_command_says_it_in_words_and_in_the_card(families, texts, tmp_path):
    config, out = tmp_path / "merge.yml", tmp_path / "merged"
    config.write_text(yaml.safe_dump(recipe(families("bert"), texts)))
    from mergekit.scripts.run_yaml import main as merge

    merge([str(config), str(out), "--quiet"], standalone_mode=False)
    general = write_texts(tmp_path / "general.jsonl", seed=9)
    arguments = ["evaluate", str(out), str(config), "--rows", "10", "--general", str(general),
                 "--json", str(tmp_path / "scores.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "Keeps " in result.output and "of what expert0 learned" in result.output
    found = json.loads((tmp_path / "scores.json").read_text())
    # What is merged for the look is what the stock command has written.
    assert found["merged"]["tasks"] == found["merge"]["tasks"]
    for _ in range(2):
        result = CliRunner().invoke(main, ["evaluate", str(out), "--rows", "10", "--card"])
        assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    assert card.count("## Evaluation") == 1
    index = yaml.safe_load(card.split("---")[1])["model-index"]
    assert index[0]["results"][0]["metrics"][0]["value"] > 0
    assert str(tmp_path) not in card.split("## Evaluation")[1]


def test_an_output_without_a_configuration_takes_the_named_one(families, texts, tmp_path):
    config, out = tmp_path / "merge.yml", tmp_path / "merged"
    config.write_text(yaml.safe_dump(recipe(families("bert"), texts)))
    shutil.copytree(families("bert")["expert0"], out)
    _fails([out, "--rows", "8"], "has no mergekit_config.yml")
    found = evaluate([out], config, rows=RowOptions(rows=8), quiet=True)
    assert found[0].of_tasks[0].kept.value == pytest.approx(1)
    config.write_text(yaml.safe_dump(recipe(families("llama"), texts)))
    _fails([out, "--config", config, "--rows", "8"],
           "is a model of type bert and expert0 of type llama; evaluate it with its own")


def _fails(arguments: list, words: str) -> None:
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    assert words in result.output
    assert result.output.strip().splitlines()[-1].count(". ") <= 1


def test_bad_input_is_one_sentence(families, texts, tmp_path):
    paths, config = families("llama"), tmp_path / "merge.yml"

    def write(**parameters):
        config.write_text(yaml.safe_dump(recipe(paths, texts, **parameters)))
        return config

    _fails([write(num_calibration_samples=60)], "is left to evaluate")
    _fails([write(), "--held-out", texts[0]], "1 times for 2 models")
    twice = ["--held-out", texts[0], "--held-out", texts[1]]
    _fails([write(), *twice], "calibration of expert0 draws")
    _fails([paths["base"]], "has no mergekit_config.yml")
    _fails([write(), "--general", tmp_path / "none.jsonl"], "does not exist")
    other = tmp_path / "other.yml"
    raw = recipe(paths, texts)
    raw["models"] = raw["models"][:1]
    other.write_text(yaml.safe_dump(raw))
    _fails([write(), other], "is a merge of base, expert0, not of base, expert0, expert1")
    raw = recipe(paths, texts)
    for model in raw["models"]:
        del model["parameters"]["calibration_dataset"]
    other.write_text(yaml.safe_dump({**raw, "merge_method": "task_arithmetic"}))
    _fails([other], "has no calibration_dataset to hold rows out of")


def test_rows_that_overlap_calibration_are_refused(families, texts, tmp_path):
    source = _source(families("llama")["expert0"])
    spec = CalibrationSpec(str(texts[0]), num_samples=20)
    with pytest.raises(PaveError, match="of 60 rows .* are rows that the calibration"):
        given(source, replace(spec, num_samples=128), spec, 100, 64)
    fresh = write_texts(tmp_path / "fresh.jsonl", seed=7)
    assert len(given(source, CalibrationSpec(str(fresh)), spec, 100, 64).items) == 60


def test_labels_are_found_by_number_and_by_name(families, tmp_path):
    source = _source(families("roberta")["expert0"])
    for label in (1, "LABEL_1"):
        data = tmp_path / f"{label}.jsonl"
        data.write_text("".join(
            json.dumps({"text": f"w{i} w{i + 1} w3", "label": label}) + "\n" for i in range(9)))
        rows = held_out(source, CalibrationSpec(str(data)), 4, 64, drawn=False)
        assert rows.labels == (1, 1, 1, 1)


def test_damage_is_said(families, texts):
    bench = _bench(families, texts, "bert", general=str(texts[1]))
    found = verdicts(bench, bench.of(_source(families("bert")["expert1"])))
    text = sentence(found[:2], found[2])
    assert "100 % of what expert1 learned" in text or "expert1" in text
    assert "away from the base on general rows" in text
    assert kind_of(bench.tasks[0].source.config()) == "encoder"
