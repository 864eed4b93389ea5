"""Parameters for a merge, read off its own weights and data.

`rank_ratio`: the largest cut that takes no more than a threshold (0.1 %) of the activated energy
`E |W x|^2` from any looked-at layer of any model, and no more than the fine-tuning had changed
(both norms of the weight), with the ranks shared between the models as the merge would share
them. The energy is that of the calibration rows, and of held-out rows where there are any: the
larger counts. Never below 0.875, the largest cut in the paper (arXiv 2510.14697): the energy of a
whole weight says little about a task vector cut to pieces. Kinds of weights that bear at least
twice the cut get a filter, and so do those that bear less. Where the configuration says 1.0 it
stays 1.0.

`num_calibration_samples`: enough for 4 tokens per dimension of the scarcest covariance, and
twice as many as now where directions that look idle on the calibration rows carry more than
twice the energy on held-out ones.

`dampening_frac`: the one whose dropped directions carry least energy on held-out rows. It stays
at its default without such rows, or where the gain is below 5 %. A configuration with
`regularization` keeps that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import click
import torch
import yaml

from mergekit_pave.parameters import DEFAULT_DAMPENING
from mergekit_pave.report.cli import device_of, merge_options
from mergekit_pave.report.gather import Layer, Merge
from mergekit_pave.report.spending import DAMPINGS, RATIOS, Seen, look
from mergekit_pave.report.summary import TOKENS_PER_DIMENSION
from mergekit_pave.store import CovarianceStore

THRESHOLD = 1e-3
# Less is not worth a line in a YAML file.
WORTH = 0.05
MOST_SAMPLES = 4096
_LEFT = "as in the configuration"


@dataclass(frozen=True)
class Line:
    """One proposed value: `filter` is for a kind of weights only."""

    name: str
    value: float | int
    why: str
    filter: str | None = None


# --- rules ---------------------------------------------------------------------------------


def module(name: str) -> str:
    """What a filter can say of a weight: the part of its name behind the last number."""
    return re.split(r"(?:^|\.)\d+\.", name.removesuffix(".weight"))[-1]


def largest_cut(seen: Iterable[Seen], threshold: float) -> float:
    """The smallest of `RATIOS` that, like all above it, every layer bears."""
    best, seen = RATIOS[0], list(seen)
    for ratio in RATIOS:
        if not all(s.bears(ratio, threshold) for s in seen):
            break
        best = ratio
    return best


def rank_ratios(
    seen: Sequence[Seen], threshold: float, purified: Sequence[str] = (),
    switched_off: Sequence[str] = (),
) -> list[Line]:
    """One line for all weights, after the filters that are needed or pay.

    Args:
        seen: what was looked at.
        threshold: share of the activated energy that may go.
        purified: names of all weights that may be cut.
        switched_off: names of those that may not.
    """
    groups: dict[str, list[Seen]] = {}
    for one in seen:
        groups.setdefault(module(one.layer.name), []).append(one)
    bears = {key: largest_cut(group, threshold) for key, group in groups.items()}
    common = _common(bears)
    mixed = {module(name) for name in purified}
    bears |= {key: 1.0 for name in switched_off if (key := module(name)) not in mixed}
    single = [name for name in switched_off if module(name) in mixed]
    special = {key: ratio for key, ratio in bears.items() if _needs(ratio, common)}
    # A filter matches every name that contains it, so the longer ones have to come first.
    shadowed = {key: common for key in bears
                if key not in special and any(other in key for other in special)}
    filters = sorted({**special, **shadowed}.items(), key=lambda item: (-len(item[0]), item[0]))
    rest = [s for key, group in groups.items() if key not in special for s in group]
    return [
        # Ahead of the kinds they are of; none of them is a part of a purified weight's name.
        *(Line("rank_ratio", 1.0, _LEFT, key) for key in _patterns(single, purified)),
        *(Line("rank_ratio", ratio, _cost(groups[key], ratio) if key in groups else _LEFT, key)
          for key, ratio in filters),
        Line("rank_ratio", common, _cost(rest or list(seen), common)),
    ]


def _patterns(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Filters for `names` and none of `others`: a layer that they have to themselves, or one."""
    layers = {name: re.match(r"(?:.*?\.)??\d+\.|", name)[0] for name in names}
    own = {layer for layer in set(layers.values())
           if layer and not any(layer in other for other in others)}
    return list(dict.fromkeys(layers[n] if layers[n] in own else n for n in names))


def _common(bears: Mapping[str, float]) -> float:
    """The ratio that leaves fewest kinds to a filter, the smaller cut where several do."""
    return min(sorted(set(bears.values()), reverse=True),
               key=lambda ratio: sum(_needs(other, ratio) for other in bears.values()))


def _needs(ratio: float, common: float) -> bool:
    """Whether `common` would cut too much, or less than half of what is possible."""
    return ratio > common or 1 - ratio > 2 * (1 - common) + 1e-9


def _cost(seen: Sequence[Seen], ratio: float) -> str:
    pairs = [pair for one in seen for pair in one.shares(ratio)]
    worst = max(spent.share(dropped) for spent, dropped in pairs)
    task = median(spent.calibration[d].item() / spent.task for spent, d in pairs if spent.task > 0)
    removed = max(spent.removed[d].item() for spent, d in pairs)
    return (f"takes at most {100 * worst:.2g}% of a layer's activated energy, in the median "
            f"{100 * task:.2g}% of its task vector's, and {removed:.2g} times what fine-tuning "
            "changed")


def samples(merge: Merge, gap: float | None) -> Line | None:
    """Enough rows for the scarcest covariance; None when no store tells its rows."""
    wanted, scarce = [], []
    for model in merge.models:
        data = model.store.manifest.get("data", {})
        if not (used := data.get("used")):
            continue
        least = min(site.count / site.width for site in model.store.sites.values())
        factor = max(TOKENS_PER_DIMENSION / max(least, 1e-9), 2 if gap and gap > 2 else 0)
        enough = min(32 * math.ceil(used * factor / 32), MOST_SAMPLES)
        asked = data.get("requested", used)
        wanted.append(max(enough, asked) if factor > 1 else asked)
        scarce.append((least, used, model.label))
    if not wanted:
        return None
    least, used, label = min(scarce)
    why = (f"{used} rows of {label} gave {least:.2g} tokens per dimension at least, "
           f"{TOKENS_PER_DIMENSION:g} are wanted")
    if gap is not None:
        why += f"; dropped directions carry {gap:.2g} times the energy on held-out rows"
    return Line("num_calibration_samples", max(wanted), why)


def gap(seen: Sequence[Seen], threshold: float) -> float | None:
    """Held-out over calibration energy of what `largest_cut` drops, in the median."""
    pairs = [pair for one in seen for pair in one.shares(largest_cut([one], threshold))]
    ratios = [spent.held_out[d].item() / spent.calibration[d].item() for spent, d in pairs
              if spent.held_out is not None and d and spent.calibration[d] > 0]
    return median(ratios) if ratios else None


def damping(seen: Sequence[Seen]) -> Line:
    """The damping with the least held-out energy dropped, by its mean logarithm."""
    scored = [one.dampings for one in seen if one.dampings]
    if not scored:
        return Line("dampening_frac", DEFAULT_DAMPENING, "the default; --held-out or --split "
                    "would measure it")
    score = {f: mean(d[f] for d in scored) for f in DAMPINGS}
    best = min(score, key=score.get)
    gain = math.exp(score[DEFAULT_DAMPENING] - score[best])
    if gain < 1 + WORTH:
        return Line("dampening_frac", DEFAULT_DAMPENING, "no other drops noticeably less "
                    "energy on held-out rows")
    return Line("dampening_frac", best, f"what {DEFAULT_DAMPENING} drops has {gain:.3g} times "
                "its energy on held-out rows")


def suggest(
    merge: Merge, layers: Sequence[Layer], held: Sequence[CovarianceStore] | None,
    device: torch.device, threshold: float = THRESHOLD, fitted: Merge | None = None,
) -> list[Line]:
    """All proposals for a merge, in the order of the YAML.

    Args:
        merge: as configured.
        layers: those to look at.
        held: per model, covariances of held-out rows.
        device: where to compute.
        threshold: share of the activated energy that may go.
        fitted: `merge` with covariances that did not see the held-out rows.
    """
    seen = look(fitted or merge, layers, held, device)
    rows = samples(merge, gap(seen, threshold))
    ratios = rank_ratios(
        seen, threshold, [layer.name for layer in merge.layers], merge.switched_off)
    absolute = any(layer.settings.regularization is not None for layer in layers)
    return [*ratios, *([rows] if rows else []), *([] if absolute else [damping(seen)])]


def to_yaml(lines: Sequence[Line]) -> str:
    """The `parameters:` to paste, a reason behind every value."""
    text = ["parameters:"]
    filtered = any(line.filter for line in lines)
    if filtered:
        text.append("  rank_ratio:")
    for line in lines:
        why = " ".join(line.why.split())
        if line.filter:
            name = yaml.safe_dump(line.filter, default_flow_style=True).splitlines()[0]
            text += [f"    - filter: {name}", f"      value: {line.value}  # {why}"]
        elif line.name == "rank_ratio" and filtered:
            text.append(f"    - value: {line.value}  # {why}")
        else:
            text.append(f"  {line.name}: {line.value}  # {why}")
    return "\n".join(text)


def overridden(merge: Merge, lines: Sequence[Line]) -> list[str]:
    """Comments on what the configuration sets at a place that goes before the top level."""
    return [
        f"# {model.entry.where} has its own {name}, which goes before the one above: set it there"
        for name in dict.fromkeys(line.name for line in lines)
        for model in merge.models if model.entry.sets(name)
    ]


# --- command -------------------------------------------------------------------------------


@click.command("suggest")
@merge_options
@click.option("--threshold", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              default=THRESHOLD, show_default=True,
              help="Share of a layer's activated energy that may go.")
@click.option("--held-out", multiple=True, metavar="DATA",
              help="Rows of its task that a model was not calibrated on, a dataset or file; once "
              "per model, in the order of CONFIG.")
@click.option("--split", "fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              metavar="FRACTION", help="Hold out this share of every model's calibration rows "
              "instead; calibrates anew.")
def suggest_cli(config: Path, layers, device, lora_merge_cache, transformers_cache,
                trust_remote_code, allow_crimes, threshold, held_out, fraction) -> None:
    """Propose rank_ratio, num_calibration_samples and damping for a merge.

    Prints `parameters:` to paste into CONFIG, a reason behind each. rank_ratio is the largest
    cut, down to 0.875, that takes at most --threshold of the activated energy from any layer of
    any model, and no more of a weight than fine-tuning had changed; kinds of weights that bear
    twice that cut, or less, get a filter, and what is 1.0 in CONFIG stays so. Samples are enough
    for 4 tokens per dimension. Damping is the one whose dropped directions carry least energy on
    held-out rows, and stays at its default without them. Nothing is merged.

    \b
    Examples:
        mergekit-pave suggest merge.yml
        mergekit-pave suggest merge.yml --split 0.5
        mergekit-pave suggest merge.yml --held-out math-dev.jsonl --held-out code-dev.jsonl
    """
    import tempfile

    from mergekit_pave.calibration.run import cache_folder
    from mergekit_pave.locate import LoaderOptions
    from mergekit_pave.report import heldout
    from mergekit_pave.report.gather import open_merge
    from mergekit_pave.report.sample import choose

    if held_out and fraction:
        raise click.UsageError("--held-out and --split exclude each other.")
    where = device_of(device)
    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    merge = open_merge(config, options, where, allow_crimes)
    chosen = choose(merge.layers, layers, where).layers
    held = heldout.from_files(merge, held_out, where) if held_out else None
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="suggest-") as folder:
        fitted = merge
        if fraction:
            fitted, held = heldout.split(merge, fraction, Path(folder), where)
        lines = suggest(merge, chosen, held, where, threshold, fitted)
    click.echo("\n".join([to_yaml(lines), *overridden(merge, lines)]))
