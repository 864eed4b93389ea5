"""In which parts a model's covariances are collected: blocks, and windows of sites."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from mergekit_pave.calibration.collect import SitePlan, plan_sites, windows
from mergekit_pave.calibration.observed import observed
from mergekit_pave.models.layers import LinearLayers

# Share of the memory for sums that the states between two blocks may take.
STATES = 0.25


@dataclass
class Plan:
    """How the sites of a model are collected.

    Attributes:
        sites: all of them, in the order of the forward pass.
        windows: those that are not finished, in runs that fit the memory for sums.
        blocks: names of the blocks to go through one by one; empty to run the model as a whole
            for each window.
        steps: for each block, and for what lies outside of them, its windows; ends with the
            last one that has any.
        marks: what an ordinary pass over `probe` gave to the blocks; in the main process only.
        probe: a batch of one row.
    """

    sites: list[SitePlan]
    windows: list[list[SitePlan]]
    blocks: tuple[str, ...] = ()
    steps: list[list[list[SitePlan]]] = field(default_factory=list)
    marks: list[list[Tensor]] = field(default_factory=list)
    probe: dict[str, Tensor] = field(default_factory=dict)


def make_plan(
    model: PreTrainedModel,
    layers: LinearLayers,
    work: Sequence[dict],
    done: Container[str],
    budget: int,
) -> Plan:
    """What is left to collect, from an ordinary forward pass over one row.

    Args:
        model: the model.
        layers: its linear layers.
        work: the batches.
        done: names of the sites that an earlier run has finished.
        budget: bytes of sums held at a time.
    """
    smallest = min(work, key=lambda batch: sum(value.numel() for value in batch.values()))
    # One row: this pass goes through the head, and a classifier without a padding token takes no
    # more than one.
    one = {name: value[:1] for name, value in smallest.items()}
    with observed(model, layers.modules) as seen:
        sites = plan_sites(model, layers.modules, one)
    todo = missing(sites, done)
    plan = Plan(sites, windows(todo, budget))
    # A single pass over the data reads offloaded weights once for each batch.
    offloaded = any(p.is_meta for p in model.parameters())
    passes = len(plan.windows) if not offloaded else len(plan.windows) * len(work)
    if not seen.blocks or passes < 2:
        return plan
    steps: list[list[SitePlan]] = [[] for _ in range(len(seen.blocks) + 1)]
    for site in todo:
        steps[seen.place(site.name)].append(site)
    while not steps[-1]:
        steps.pop()
    # The weights of a whole block are in memory, too, so its sums get half of the room.
    room = budget // 2
    return Plan(sites, plan.windows, seen.blocks, [windows(step, room) for step in steps],
                seen.marks, one)


def missing(sites: Sequence[SitePlan], done: Container[str]) -> list[SitePlan]:
    return [site for site in sites if site.name not in done]
