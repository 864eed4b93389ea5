"""The proposals: rules on made-up spectra, and whole runs whose YAML mergekit reads back."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import recipe, write_texts
from mergekit.config import MergeConfiguration, evaluate_setting

from mergekit_pave import allocation, suggest
from mergekit_pave.errors import PaveError
from mergekit_pave.locate import LoaderOptions
from mergekit_pave.report import gather, heldout, spending
from mergekit_pave.report.spending import DAMPINGS, RATIOS, Seen, Spent

CPU = torch.device("cpu")
RANK = 400


def seen(name: str, bears: float, *, models: int = 2, held: float | None = None,
         dampings: dict | None = None, removed: float = 1e-3) -> Seen:
    """A layer whose models lose `THRESHOLD` exactly at the ratio `bears`, and with each direction
    `removed` of what fine-tuning changed."""
    settings = gather.Settings(0.98, "uniform", "covariance", None, None)
    layer = gather.Layer(name, 0, name, (RANK, RANK), settings)
    count = allocation.cap(RANK, RATIOS[-1])
    drop = allocation.allocate([torch.zeros(count)], RANK, bears, "uniform")[0]
    per = suggest.THRESHOLD * 0.999 / drop
    energy = per * torch.arange(count + 1, dtype=torch.float64)
    spent = Spent(torch.zeros(count), energy, None if held is None else held * energy,
                  removed * torch.arange(count + 1), 0.1)
    return Seen(layer, [spent] * models, dampings or {})


def names(*keys: str) -> list[str]:
    return [f"model.layers.0.{key}.weight" for key in keys]


def read(lines, tensor: str) -> float:
    """The rank ratio that mergekit gives a tensor, from the printed YAML."""
    raw = {"merge_method": "linear", **yaml.safe_load(suggest.to_yaml(lines))}
    config = MergeConfiguration.model_validate({**raw, "models": [{"model": "a"}]})
    return evaluate_setting(tensor, config.parameters["rank_ratio"], validate=float)


# --- rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bears", [0.99, 0.95, 0.9])
def test_the_largest_cut_below_the_threshold(bears):
    assert suggest.largest_cut([seen("a", 0.875), seen("b", bears)], suggest.THRESHOLD) == bears


def test_no_cut_goes_beyond_the_papers_largest():
    assert suggest.largest_cut([seen("a", 0.5)], 0.9) == 0.875


def test_no_more_is_dropped_than_fine_tuning_changed():
    """20 of 400 directions are 5 %, and each takes a twentieth of the change."""
    assert suggest.largest_cut([seen("a", 0.875, removed=1 / 20)], suggest.THRESHOLD) == 0.95
    nothing = 0.999  # of 400 directions
    assert suggest.largest_cut([seen("a", 0.875, removed=2.0)], suggest.THRESHOLD) == nothing


def test_held_out_rows_count_where_they_lose_more():
    alone = suggest.largest_cut([seen("a", 0.95)], suggest.THRESHOLD)
    held = suggest.largest_cut([seen("a", 0.95, held=2.0)], suggest.THRESHOLD)
    assert alone == 0.95
    assert held == 0.98
    assert suggest.largest_cut([seen("a", 0.95, held=0.5)], suggest.THRESHOLD) == 0.95


def test_a_kind_that_bears_as_much_needs_no_filter():
    lines = suggest.rank_ratios([seen(n, b) for n, b in zip(
        names("attn.q", "attn.k", "mlp.up"), (0.98, 0.98, 0.97), strict=True)], 1e-3)
    assert [(line.filter, line.value) for line in lines] == [(None, 0.98)]


def test_kinds_that_bear_more_or_less_get_filters():
    kinds = dict(zip(names("attn.q", "attn.k", "mlp.up", "mlp.down"),
                     (0.98, 0.98, 0.9, 0.995), strict=True))
    lines = suggest.rank_ratios([seen(n, b) for n, b in kinds.items()], 1e-3)
    assert lines[-1].filter is None and lines[-1].value == 0.98
    assert {line.filter for line in lines[:-1]} == {"mlp.up", "mlp.down"}
    for name, ratio in kinds.items():
        assert read(lines, name) == ratio


def test_a_filter_does_not_catch_a_longer_name():
    """`output.dense` is part of `attention.output.dense`, and mergekit's filters are parts."""
    kinds = dict(zip(names("output.dense", "attention.output.dense", "intermediate.dense"),
                     (0.9, 0.98, 0.98), strict=True))
    lines = suggest.rank_ratios([seen(n, b) for n, b in kinds.items()], 1e-3)
    for name, ratio in kinds.items():
        assert read(lines, name) == ratio


@pytest.mark.parametrize("off", [
    names("attn.q", "attn.k"),  # a whole kind
    names("mlp.up"),  # a part of a kind that is cut elsewhere
    names("mlp.up", "mlp.down", "attn.q", "attn.k"),  # a whole layer
    names("mlp"),  # a part of the names of kinds that are cut
], ids=["kind", "part", "layer", "short"])
@pytest.mark.parametrize("bears", [(0.9, 0.95), (0.98, 0.995), (0.99, 0.9)])
def test_what_is_switched_off_stays_so(off, bears):
    up, down = (name.replace("0", "1") for name in names("mlp.up", "mlp.down"))
    layers = [seen(up, bears[0]), seen(down, bears[1])]
    # Looked at or not, these are of kinds that are cut.
    purified = [up, down, "model.layers.10.mlp.up.weight"]
    lines = suggest.rank_ratios(layers, 1e-3, purified, off)
    for name in off:
        assert read(lines, name) == 1.0, name
    alone = suggest.rank_ratios(layers, 1e-3)
    assert all(read(lines, name) == read(alone, name) < 1 for name in purified)


def test_experts_of_a_layer_are_one_kind():
    assert suggest.module("model.layers.3.mlp.experts.7.up_proj.weight") == "up_proj"
    assert suggest.module("encoder.block.1.layer.0.SelfAttention.q.weight") == "SelfAttention.q"
    assert suggest.module("pooler.dense.weight") == "pooler.dense"


def test_damping_is_the_one_that_generalises():
    flat = dict.fromkeys(DAMPINGS, 0.0)
    assert suggest.damping([seen("a", 0.98)]).value == 0.01
    assert suggest.damping([seen("a", 0.98, dampings={**flat, 0.1: -0.01})]).value == 0.01
    line = suggest.damping([seen("a", 0.98, dampings={**flat, 0.1: -0.5})])
    assert line.value == 0.1
    assert "1.65 times" in line.why


# --- whole runs ----------------------------------------------------------------------------


@pytest.fixture
def config(families, texts, tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(recipe(families("llama"), texts)))
    return path


def run(config, *options):
    return CliRunner().invoke(suggest.suggest_cli, [str(config), *options])


def printed(result) -> str:
    assert result.exit_code == 0, result.output
    return result.output[result.output.index("parameters:"):]


def test_what_is_printed_can_be_pasted(config):
    raw = yaml.safe_load(config.read_text())
    raw["parameters"] = yaml.safe_load(printed(run(config)))["parameters"]
    config.write_text(yaml.safe_dump(raw))
    merge = gather.open_merge(config, LoaderOptions(), CPU)
    assert all(0.875 <= layer.settings.rank_ratio < 1 for layer in merge.layers)
    assert raw["parameters"]["dampening_frac"] == 0.01


@pytest.mark.parametrize("ratio", [
    [{"filter": "mlp", "value": 0.9}, {"value": 1.0}],
    [{"filter": "q_proj", "value": 1.0}, {"value": 0.95}],
    [{"filter": "layers.0.mlp.up_proj", "value": 1.0}, {"value": 0.95}],
    [0.9, 1.0],
])
def test_what_the_configuration_switches_off_stays_so(config, ratio):
    raw = yaml.safe_load(config.read_text())
    raw["parameters"]["rank_ratio"] = ratio
    config.write_text(yaml.safe_dump(raw))
    before = {layer.name for layer in gather.open_merge(config, LoaderOptions(), CPU).layers}
    raw["parameters"] = yaml.safe_load(printed(run(config)))["parameters"]
    config.write_text(yaml.safe_dump(raw))
    after = {layer.name for layer in gather.open_merge(config, LoaderOptions(), CPU).layers}
    assert after and after <= before


def test_the_threshold_holds_for_the_purified_weights(config):
    """Densely, with the projections that the merge would make."""
    merge = gather.open_merge(config, LoaderOptions(), CPU)
    lines = suggest.suggest(merge, merge.layers, None, CPU, threshold=1e-3)
    for layer in merge.layers:
        ratio = read(lines, layer.name)
        spectra, parts = [], []
        for model in layer.own:
            w, c = merge.weight(layer, model).double(), merge.covariance(layer, model).double()
            damped = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
            u, s, _ = torch.linalg.svd(w @ damped, full_matrices=False)
            spectra.append(s.flip(0) / s[0])
            parts.append((w, c, u))
        for dropped, (w, c, u) in zip(
                allocation.allocate(spectra, layer.rank, ratio), parts, strict=True):
            lost = u[:, layer.rank - dropped:].T @ w
            share = torch.trace(lost @ c @ lost.T) / torch.trace(w @ c @ w.T)
            assert share < 1e-3
            assert lost.norm() <= (w - merge.base_weight(layer).double()).norm()


def test_scarce_data_ask_for_more_rows(families, texts, tmp_path):
    path = tmp_path / "merge.yml"
    raw = recipe(families("llama"), texts, num_calibration_samples=3)
    path.write_text(yaml.safe_dump(raw))
    text = printed(run(path, "--layers", "1"))
    merge = gather.open_merge(path, LoaderOptions(), CPU)
    least = min(s.count / s.width for m in merge.models for s in m.store.sites.values())
    wanted = int(re.search(r"num_calibration_samples: (\d+)", text)[1])
    assert least < 4
    assert 3 * 4 / least <= wanted <= 3 * 4 / least + 32
    assert "tokens per dimension" in text


def test_no_fewer_rows_are_proposed_where_more_are_wanted():
    store = SimpleNamespace(manifest={"data": {"used": 8000, "requested": 8192}},
                            sites={"a": SimpleNamespace(count=1200, width=1000)})
    merge = SimpleNamespace(models=[SimpleNamespace(store=store, label="a")])
    assert suggest.samples(merge, None).value == 8192


def test_an_absolute_damping_stays(config):
    raw = yaml.safe_load(config.read_text())
    raw["parameters"]["regularization"] = 1e-3
    config.write_text(yaml.safe_dump(raw))
    proposed = yaml.safe_load(printed(run(config, "--layers", "1")))["parameters"]
    assert "rank_ratio" in proposed and "dampening_frac" not in proposed


def test_what_would_override_a_proposal_is_said(config):
    raw = yaml.safe_load(config.read_text())
    raw["models"][1]["parameters"]["num_calibration_samples"] = 3
    raw["parameters"]["num_calibration_samples"] = 2
    config.write_text(yaml.safe_dump(raw))
    text = printed(run(config, "--layers", "1"))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# models[1] has its own num_calibration_samples, which goes before the one above: "
        "set it there"]
    assert yaml.safe_load(text)["parameters"]["num_calibration_samples"] > 3


def test_held_out_rows_measure_damping_and_gap(config, tmp_path, texts):
    files = [str(write_texts(tmp_path / f"{i}.jsonl", seed=10 + i)) for i in range(2)]
    result = run(config, "--layers", "1", "--held-out", files[0], "--held-out", files[1])
    assert "times the energy on held-out rows" in printed(result)
    assert "held-out would measure" not in result.output


def test_a_split_leaves_no_stores_behind(config, tmp_path):
    result = run(config, "--layers", "1", "--split", "0.5")
    assert "times the energy on held-out rows" in printed(result)
    assert not list((tmp_path / "cache").glob("suggest-*"))


def test_a_split_is_a_partition_of_the_rows(config, tmp_path):
    merge = gather.open_merge(config, LoaderOptions(), CPU)
    fitted, held = heldout.split(merge, 0.25, tmp_path, CPU)
    for whole, part, rest in zip(merge.models, fitted.models, held, strict=True):
        for name, site in whole.store.sites.items():
            n, a, b = site.count, part.store.sites[name].count, rest.sites[name].count
            assert n == a + b and 2 < a / b < 4.5
            together = (a * part.store.covariance(name) + b * rest.covariance(name)) / n
            torch.testing.assert_close(together, whole.store.covariance(name),
                                       rtol=1e-4, atol=1e-4)


def test_rows_that_a_model_has_written_can_be_split(config, tmp_path):
    raw = yaml.safe_load(config.read_text())
    for model in raw["models"]:
        model["parameters"]["calibration_dataset"] = "self"
    config.write_text(yaml.safe_dump(raw))
    assert "times the energy on held-out rows" in printed(run(config, "--split", "0.5"))
    merge = gather.open_merge(config, LoaderOptions(), CPU)
    fitted, held = heldout.split(merge, 0.25, tmp_path, CPU)
    for whole, part, rest in zip(merge.models, fitted.models, held, strict=True):
        assert [store.manifest["data"]["generated"] for store in (part.store, rest)] == [True] * 2
        for name, site in whole.store.sites.items():
            assert site.count == part.store.sites[name].count + rest.sites[name].count


def test_held_out_energy_is_that_of_the_other_rows(config):
    merge = gather.open_merge(config, LoaderOptions(), CPU)
    layer = merge.layers[0]
    # The other model's rows stand in for held-out ones.
    held = [merge.models[1].store, merge.models[0].store]
    (one,) = spending.look(merge, [layer], held, CPU)
    w, c = merge.weight(layer, 0).double(), merge.covariance(layer, 0).double()
    other = merge.models[1].store.covariance(merge.site(layer, 0)).double()
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u = torch.linalg.svd(w @ damped).U[:, -3:]
    want = torch.trace(u.T @ w @ other @ w.T @ u) / torch.trace(w @ other @ w.T)
    assert one.models[0].held_out[3].item() == pytest.approx(want.item(), rel=1e-6)


def test_wrong_options_are_explained(config, texts):
    result = run(config, "--held-out", str(texts[0]))
    assert result.exit_code == 1
    assert "once for each of expert0, expert1" in result.output
    result = run(config, "--held-out", str(texts[0]), "--split", "0.5")
    assert "exclude each other" in result.output


def test_a_finished_store_cannot_be_split(config, tmp_path):
    merge = gather.open_merge(config, LoaderOptions(), CPU)
    raw = yaml.safe_load(config.read_text())
    raw["models"][0]["parameters"] = {
        "weight": 1.0, "covariance": str(merge.models[0].store.folder)}
    config.write_text(yaml.safe_dump(raw))
    merge = gather.open_merge(config, LoaderOptions(), CPU)
    with pytest.raises(PaveError, match="expert0 has a finished covariance store"):
        heldout.split(merge, 0.5, tmp_path, CPU)
