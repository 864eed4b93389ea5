"""The model card of a merge: mergekit's own, plus what it cannot know.

mergekit writes README.md and mergekit_config.yml. `write_card` adds metadata, a section on
method and calibration and the citation, and takes local paths out of both files. Running it again
changes nothing; the section lies between two comments and the rest of the card is the user's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod, ParameterScope

from mergekit_pave.algebra.papers import PAVE
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.base import ABOUT
from mergekit_pave.models.names import is_local, last_part
from mergekit_pave.models.source import paths_of
from mergekit_pave.publish import record, scrub
from mergekit_pave.recipe.inputs import inputs, purifies, unwrapped
from mergekit_pave.recipe.parameters import DATA_FREE, DEFAULT_DAMPENING, DEFAULT_RATIO, PARAMETERS
from mergekit_pave.recipe.reading import CONFIGURATION, configuration
from mergekit_pave.recipe.spelling import is_ours, our_method
from mergekit_pave.storage.files import write_text

CARD = "README.md"
# Of `mergekit-pave report`, written into the model's folder or one inside it.
FIGURES = ("figures/spectra.png", "report/figures/spectra.png")
TAGS = ("mergekit", "merge")

# Of `purify`, and where filters give it several values.
_FORMS = {
    "weight": "in every linear layer, the output directions that the fine-tuned model's own data "
    "activates least were removed from its weight.",
    "delta": "in every linear layer, the output directions that the fine-tuned model's own data "
    "activates least were removed from its difference from the base.",
    "separate": "in every linear layer, the inputs of each model's difference from the base were "
    "weighed by how much they are those of its own data rather than the others'.",
    "as configured": "in every linear layer, as the configuration says.",
}

BEGIN, END = "<!-- mergekit-pave: begin -->", "<!-- mergekit-pave: end -->"


def write_card(folder: Path | str) -> str:
    """Complete the card of the merged model in `folder`; return its text.

    Writes README.md, mergekit_config.yml and, if the merge left none, `record.NAME`.

    Raises:
        PaveError: no output of mergekit, or of a method that is not ours.
    """
    folder = Path(folder)
    card_text, source = (_read(folder, name) for name in (CARD, CONFIGURATION))
    raw = _parse(folder, source)
    config = configuration(raw)
    if not is_ours(config.merge_method):
        raise PaveError(
            f"{folder} was merged with {config.merge_method}, which is no method of mergekit-pave: "
            "mergekit's own card says all there is."
        )
    found = record.read(folder)
    known = found is not None and found["merge_method"] == config.merge_method
    facts = found if found is not None and known else record.of_configuration(config)
    local = record.local_names(config, facts)
    clean_source = scrub.scrub_configuration(raw, local)
    card = _load(folder, scrub.scrub_card(card_text, raw, local))
    _complete_metadata(card, config, facts)
    figure = next((name for name in FIGURES if (folder / name).exists()), None)
    card.text = _with_section(card.text, section(config, facts, figure))
    text = str(card)
    # The configuration comes last: it tells a second run which paths the card may still hold.
    if not known:
        record.write(folder, facts)
    write_text(folder / CARD, text)
    write_text(folder / CONFIGURATION, clean_source)
    return text


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text("utf-8")
    except FileNotFoundError:
        raise PaveError(
            f"{folder} has no {name}: it is no output of mergekit-yaml, or was merged with "
            "--no-write-model-card."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PaveError(f"{folder / name} cannot be read: {error}.") from error


def _parse(folder: Path, source: str) -> Any:
    try:
        raw = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise PaveError(f"{folder / CONFIGURATION} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise PaveError(f"{folder / CONFIGURATION} holds no merge configuration.")
    return raw


def _load(folder: Path, text: str) -> ModelCard:
    try:
        return ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PaveError(
            f"The metadata at the head of {folder / CARD} is broken ({reason}); repair the block "
            "between the two `---` lines."
        ) from error


def _complete_metadata(card: ModelCard, config: MergeConfiguration, facts: Mapping) -> None:
    data: Any = card.data  # its attributes are the keys of the card
    method = our_method(config.merge_method)
    tags = ["pave"] if purifies(method) else []
    tags += [name for name in [unwrapped(method).spec.name] if name in ABOUT]
    data.tags = _unique([*(data.tags or []), *TAGS, *tags])
    data.base_model = _parents(config, facts, data.base_model)
    if data.base_model:
        data.base_model_relation = "merge"
    datasets = [m["data"]["dataset"] for m in facts["models"] if _on_hub(m["data"])]
    data.datasets = _unique([*_listed(data.datasets), *datasets]) or None


def _parents(config: MergeConfiguration, facts: Mapping, listed: Any) -> list[str] | None:
    """Hub ids of base and models, in the order of the configuration; mergekit's has none."""
    references = [config.base_model, *(entry.model for entry in inputs(config))]
    order = [path for ref in references if ref for path in paths_of(ref)]
    # mergekit asked the Hub about names that could be either; a name alone does not tell.
    local = record.local_names(config, facts)
    local |= {last_part(name) for name in local}
    found = {name for name in _listed(listed) if not is_local(name)} - local
    found |= {name for about in (facts["base"], *facts["models"]) if about for name in about["hub"]}
    ordered = [name for name in _unique([*order, *sorted(found)]) if name in found]
    return [name for name in ordered if _is_repo_id(name)] or None


def _on_hub(data: Mapping[str, Any] | None) -> bool:
    if not data or data["local"] or data.get("generated") or data["dataset"] == DATA_FREE:
        return False
    return _is_repo_id(data["dataset"])


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def section(config: MergeConfiguration, facts: Mapping, figure: str | None = None) -> str:
    """Method, calibration and citation, as Markdown."""
    method = our_method(config.merge_method)
    inner, purified = unwrapped(method), _purified(config, facts)
    about = ABOUT.get(inner.spec.name)
    parts, papers = [], [PAVE] if purified else []
    if about:
        parts += ["## Method", about.text, _method_settings(inner, config.parameters)]
        papers += about.papers
    if purifies(method) and not purified:
        parts.append(f"Nothing was purified: the merge is that of `{inner.spec.name}`.")
    if purified or getattr(inner, "solves", False):
        parts += ["## Calibration", *_calibration(config, facts, purified)]
    if purified and figure:
        parts.append(f"![Singular values, plain and weighted by the covariance]({figure})")
    if papers:
        cited = "\n\n".join(paper.bibtex for paper in papers)
        parts += ["## Citation", f"```bibtex\n{cited}\n```"]
    return "\n\n".join(part for part in parts if part)


def _purified(config: MergeConfiguration, facts: Mapping) -> bool:
    """Whether any tensor was: not by a method that is no twin, nor with `rank_ratio: 1.0`."""
    if not purifies(our_method(config.merge_method)):
        return False
    if counts := facts["tensors"]:
        return counts["purified"] > 0
    return any(entry.can_be("rank_ratio") != {1} for entry in inputs(config))


def _method_settings(method: MergeMethod, parameters: Mapping[str, Any] | None) -> str:
    """The keys that are the method's own and the same for all models."""
    own = [p for p in method.spec.parameters
           if p.scope == ParameterScope.SHARED and p.name not in PARAMETERS]
    values = {p.name: _given(parameters, p.name, p.default) for p in own}
    known = ", ".join(f"`{name}` {value}" for name, value in values.items() if value is not None)
    return f"Settings: {known}."


def _calibration(config: MergeConfiguration, facts: Mapping, purified: bool) -> Iterator[str]:
    if purified:
        yield (
            f"The task vectors were purified before they were merged (PAVE, {PAVE.link}): "
            f"{_FORMS[_value(config.parameters, 'purify')]}"
        )
    # A merge that is known to have ended tells whose data it did not need, as of a weight of 0.
    yield _table([m for m in facts["models"] if m["data"] or m["ranks"] or not facts["tensors"]],
                 purified)
    yield "\n".join(f"* {line}" for line in _remarks(config, facts, purified))


def _with_section(text: str, new: str) -> str:
    block = f"{BEGIN}\n{new}\n{END}"
    old = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if old.search(text):
        return old.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n"


def _table(models: Iterable[Mapping[str, Any]], purified: bool) -> str:
    rows = [
        [model["id"], _data(model["data"]), *_amounts(model["data"]), _kept(model["ranks"])]
        for model in models
    ]
    if not rows:
        return ""
    head = ["model", "data", "samples", "tokens", "ranks kept"]
    lines = [head, ["---", "---", "---:", "---:", "---:"], *rows]
    columns = len(head) if purified else len(head) - 1  # no ranks
    return "\n".join("| " + " | ".join(map(_cell, line[:columns])) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _data(data: Mapping[str, Any] | None) -> str:
    if not data:
        return "not recorded"
    name = data["dataset"]
    if data.get("generated"):
        return f"{name} (generated by the model itself)"
    if name == DATA_FREE:
        return f"{name} (covariances estimated from the task vector)"
    if data["local"]:
        name += " (not published)"
    elif _is_repo_id(name):
        name = f"[{name}](https://huggingface.co/datasets/{name})"
    about = [name, data.get("config"), data.get("split"), "+".join(data.get("columns") or [])]
    return ", ".join(part for part in about if part)


def _amounts(data: Mapping[str, Any] | None) -> tuple[str, str]:
    """Samples and tokens, `-` where the statistics were not found."""
    used, tokens = (data or {}).get("used"), (data or {}).get("tokens")
    asked = (data or {}).get("requested")
    samples = f"{used:,}" if used else f"at most {asked:,}" if asked else "-"
    return samples, f"{tokens:,}" if tokens else "-"


def _kept(ranks: Mapping[str, tuple[int, int]] | None) -> str:
    if not ranks:
        return "-"
    shares = [1 - dropped / full for full, dropped in ranks.values()]
    total = 1 - sum(d for _, d in ranks.values()) / sum(full for full, _ in ranks.values())
    return f"{total:.2%} ({min(shares):.2%} to {max(shares):.2%} per tensor)"


def _remarks(
    config: MergeConfiguration, facts: Mapping[str, Any], purified: bool
) -> Iterator[str]:
    method = our_method(config.merge_method)
    treated = (method if purified else unwrapped(method)).treated
    if purified:
        yield _settings(config.parameters)
    # What a twin counts is what it purified.
    if (counts := facts["tensors"]) and (purified or not purifies(method)):
        yield f"{counts['purified']} tensors were {treated}, {counts['plain']} merged plainly."
    for model in facts["models"]:
        known = model["statistics"] or {}
        if skipped := known.get("skipped"):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
            yield f"{model['id']}: linear layers that were not {treated} ({reasons})."
        if known and known["rows_per_feature"] < 1:
            yield (
                f"{model['id']}: some covariances come from fewer tokens than features (least: "
                f"{known['rows_per_feature']} tokens per feature)."
            )


def _value(parameters: Mapping[str, Any] | None, name: str) -> Any:
    return _given(parameters, name, PARAMETERS[name].default)


def _given(parameters: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What the whole merge was given, or the default; filters and gradients in words."""
    given = (parameters or {}).get(name, default)
    return "as configured" if isinstance(given, (list, dict)) else given


def _settings(parameters: Mapping[str, Any] | None) -> str:
    purify, ratio = _value(parameters, "purify"), _value(parameters, "rank_ratio")
    damping = _value(parameters, "regularization")
    if damping is None:
        fraction = _value(parameters, "dampening_frac")
        damping = f"{DEFAULT_DAMPENING if fraction is None else fraction} of the mean diagonal"
    if purify == "separate":
        strength = _value(parameters, "separation")
        strength = "1 / (models - 1)" if strength is None else strength
        return f"How much the others' inputs count (`separation`): {strength}; damping: {damping}."
    if ratio is None:
        ratio = DEFAULT_RATIO.get(purify, "the default")
    return (
        f"Kept fraction of the ranks (`rank_ratio`): {ratio}; allocation: "
        f"{_value(parameters, 'rank_allocation')}; directions ranked by: "
        f"{_value(parameters, 'subspace')}; damping: {damping}."
    )
