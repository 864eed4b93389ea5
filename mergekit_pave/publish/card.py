"""The model card of a merge: mergekit's own, plus what it cannot know.

mergekit writes README.md and mergekit_config.yml. `write_card` adds metadata, a section on
method and calibration and the citation, and takes local paths out of both files. Running it again
changes nothing; the section lies between two comments and the rest of the card is the user's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from mergekit.merge_methods import MergeMethod, ParameterScope

from mergekit_pave.algebra.papers import PAVE
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.base import ABOUT
from mergekit_pave.models.folder import make_public
from mergekit_pave.models.names import is_local, last_part
from mergekit_pave.models.source import paths_of
from mergekit_pave.publish import record, scrub
from mergekit_pave.publish.markdown import CARD, parsed_card, rendered, table, with_block
from mergekit_pave.recipe.inputs import purifies
from mergekit_pave.recipe.parameters import (
    DATA_FREE,
    DEFAULT_DAMPENING,
    DEFAULT_RATIO,
    PARAMETERS,
    PURIFICATION,
)
from mergekit_pave.recipe.reading import CONFIGURATION, UNREADABLE, bounded
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.recipe.spelling import is_ours
from mergekit_pave.storage.files import write_text

# Where `mergekit-pave report` may have written its first figure.
FIGURES = ("figures/spectra.png", "report/figures/spectra.png")
TAGS = ("mergekit", "merge")

BLOCK = "mergekit-pave"


def write_card(folder: Path | str) -> str:
    """Complete the card of the merged model in `folder`; return its text.

    Writes README.md and mergekit_config.yml, and takes local paths out of the model's settings.

    Raises:
        PaveError: no output of mergekit, of a method that is not ours, or without a record.
    """
    folder = Path(folder)
    card_text, source = (_read(folder, name) for name in (CARD, CONFIGURATION))
    raw = _parse(folder, source)
    recipe = Recipe.of(raw)
    config = recipe.config
    if not is_ours(config.merge_method):
        raise PaveError(
            f"{folder} was merged with {config.merge_method}, which is no method of mergekit-pave: "
            "mergekit's own card says all there is."
        )
    facts = record.read(folder)
    if facts is None or facts.merge_method != config.merge_method:
        raise PaveError(
            f"{folder} has no record of this merge ({record.NAME}), which says what its data were: "
            "merge again."
        )
    local = record.local_names(recipe, facts)
    clean_source = scrub.scrub_configuration(raw, local)
    card = parsed_card(folder / CARD, scrub.scrub_card(card_text, raw, local))
    _complete_metadata(card, recipe, facts)
    figure = next((name for name in FIGURES if (folder / name).exists()), None)
    card.text = with_block(card.text, BLOCK, section(recipe, facts, figure))
    text = str(card)
    make_public(folder)
    # The configuration comes last: it tells a second run which paths the card may still hold.
    write_text(folder / CARD, text)
    write_text(folder / CONFIGURATION, clean_source)
    return text


def _read(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        raise PaveError(
            f"{folder} has no {name}: it is no output of mergekit-yaml, or was merged with "
            "--no-write-model-card."
        )
    try:
        return (folder / name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PaveError(f"{folder / name} cannot be read: {error}.") from error


def _parse(folder: Path, source: str) -> Any:
    try:
        raw = bounded(yaml.safe_load(source), str(folder / CONFIGURATION))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise PaveError(f"{folder / CONFIGURATION} is not YAML: {reason}.") from error
    if not isinstance(raw, dict):
        raise PaveError(f"{folder / CONFIGURATION} holds no merge configuration.")
    return raw


def _complete_metadata(card: ModelCard, recipe: Recipe, facts: record.Record) -> None:
    data: Any = card.data  # its attributes are the keys of the card
    tags = ["pave"] if purifies(recipe.method) else []
    tags += [name for name in [recipe.inner.spec.name] if name in ABOUT]
    data.tags = _unique([*(data.tags or []), *TAGS, *tags])
    data.base_model = _parents(recipe, facts, data.base_model)
    if data.base_model:
        data.base_model_relation = "merge"
    datasets = [m.data["dataset"] for m in facts.models if m.data and _on_hub(m.data)]
    data.datasets = _unique([*_listed(data.datasets), *datasets]) or None


def _parents(recipe: Recipe, facts: record.Record, listed: Any) -> list[str] | None:
    """Hub ids of base and models, in the order of the configuration; mergekit's has none."""
    references = [recipe.config.base_model, *(entry.model for entry in recipe.inputs)]
    order = [path for ref in references if ref for path in paths_of(ref)]
    # mergekit asked the Hub about names that could also be folders; the record knows which were.
    local = record.local_names(recipe, facts)
    local |= {last_part(name) for name in local}
    found = {name for name in _listed(listed) if not is_local(name)} - local
    found |= {name for parent in (facts.base, *facts.models) if parent for name in parent.hub}
    ordered = [name for name in _unique([*order, *sorted(found)]) if name in found]
    return [name for name in ordered if _is_repo_id(name)] or None


def _on_hub(data: Mapping[str, Any]) -> bool:
    if data["local"] or data.get("generated") or data["dataset"] == DATA_FREE:
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


def section(recipe: Recipe, facts: record.Record, figure: str | None = None) -> str:
    """Method, calibration and citation, as Markdown."""
    inner, purified = recipe.inner, _purified(recipe, facts)
    parameters, about = recipe.config.parameters, ABOUT.get(inner.spec.name)
    method: Any = recipe.method if purified else inner
    # A purified twin counts what it purified, not what its inner method treated.
    counted = facts.tensors and (purified or not purifies(recipe.method))
    return rendered(
        "merge.md", about=about, settings=_method_settings(inner, parameters),
        inner=inner.spec.name, untouched=purifies(recipe.method) and not purified,
        purified=purified, calibrated=purified or getattr(inner, "solves", False), pave=PAVE,
        how=_purification(parameters), models=_table(facts, purified),
        counts=facts.tensors if counted else None, treated=getattr(method, "treated", ""),
        known=[model for model in facts.models if model.statistics],
        figure=figure if purified else None,
        papers=([PAVE] if purified else []) + [*(about.papers if about else ())])


def _purified(recipe: Recipe, facts: record.Record) -> bool:
    """Whether any tensor was purified; `rank_ratio: 1.0` purifies none."""
    return purifies(recipe.method) and facts.tensors is not None and facts.tensors.purified > 0


def _method_settings(method: MergeMethod, parameters: Mapping[str, Any] | None) -> str:
    """The keys that are the method's own and the same for all models."""
    own = [p for p in method.spec.parameters
           if p.scope == ParameterScope.SHARED and p.name not in PARAMETERS]
    values = {p.name: _given(parameters, p.name, p.default) for p in own}
    return ", ".join(f"`{name}` {value}" for name, value in values.items() if value is not None)


def _table(facts: record.Record, purified: bool) -> str:
    # A model that the merge did not look at, as with a weight of 0, has neither data nor ranks.
    rows = [[model.id, _data(model.data), *_amounts(model.data), _kept(model.ranks)]
            for model in facts.models if model.data or model.ranks]
    if not rows:
        return ""
    head = ["model", "data", "samples", "tokens", "ranks kept"]
    columns = len(head) if purified else len(head) - 1  # no ranks
    return table([row[:columns] for row in (head, *rows)], 2)


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
    """Samples and tokens, `-` where there are none."""
    used, tokens = ((data or {}).get(key) for key in ("used", "tokens"))
    return f"{used:,}" if used else "-", f"{tokens:,}" if tokens else "-"


def _kept(ranks: Mapping[str, tuple[int, int]] | None) -> str:
    if not ranks:
        return "-"
    shares = [1 - dropped / full for full, dropped in ranks.values()]
    total = 1 - sum(d for _, d in ranks.values()) / sum(full for full, _ in ranks.values())
    return f"{total:.2%} ({min(shares):.2%} to {max(shares):.2%} per tensor)"


def _given(parameters: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What the whole merge was given, or the default; filters and gradients in words."""
    given = (parameters or {}).get(name, default)
    return "as configured" if isinstance(given, (list, dict)) else given


def _purification(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of purification in words, with their defaults worked out."""
    how = {p.name: _given(parameters, p.name, p.default) for p in PURIFICATION}
    how["damping"] = how["regularization"]
    if how["damping"] is None:
        fraction = how["dampening_frac"]
        fraction = DEFAULT_DAMPENING if fraction is None else fraction
        how["damping"] = f"{fraction} of the mean diagonal"
    if how["separation"] is None:
        how["separation"] = "1 / (models - 1)"
    if how["rank_ratio"] is None:
        how["rank_ratio"] = DEFAULT_RATIO.get(how["purify"], "the default")
    return how
