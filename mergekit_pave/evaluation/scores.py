"""What a model is scored by, row by row, without labels: how near it stays to the expert.

Of a language model: the mean loss of a row's tokens, the mean Kullback-Leibler divergence from the
expert, and how often both would write the same next token. Of a classifier, under the expert's own
head: divergence, agreement, and accuracy where the rows have labels. Of any other encoder, the
distance of its last hidden state from the expert's: with `m` and `e` (width,) the means over a
row's positions, and `c` the mean of `e` over all rows,

    1 - (m - c)(e - c) / (|m - c| |e - c|),

0 where they point the same way. What all texts have in common, most of a hidden state, is taken out
first; its length, which grows with every fine-tuning and which no head on normalised or scaled
features sees, does not count.

An expert is run once, and what it said is kept in a compact form: of a distribution over a
vocabulary, the `TOP` most probable tokens and the probability of all others together. The
divergence of two distributions that are cut down alike is never above the whole one's, and all of
it where the vocabulary has no more than `TOP` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_pave.calibration.samples import stacked
from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.passes import outputs
from mergekit_pave.models.layers import class_name

Kind = Literal["language", "classifier", "encoder"]
Item = dict[str, Tensor]
Scores = dict[str, np.ndarray]
# Row -> what the expert said about it.
Reference = list[dict[str, Tensor]]

TOP = 64
BATCH_TOKENS = 2048


def kind_of(config: PretrainedConfig) -> Kind:
    """What kind of model the expert is, by the class in its config."""
    name = class_name(config)
    if "SequenceClassification" in name or "ImageClassification" in name:
        return "classifier"
    if any(part in name for part in ("CausalLM", "LMHead", "ConditionalGeneration")):
        return "language"
    return "encoder"


def measures(kind: Kind) -> tuple[str, ...]:
    """The scores that tell how much of an expert a merge keeps, the first one if it can."""
    return {"language": ("loss", "kl"), "classifier": ("kl",), "encoder": ("distance",)}[kind]


def reference(
    model: PreTrainedModel, kind: Kind, items: Sequence[Item],
    labels: Sequence[int] | None = None, seen: Callable[[int], object] = lambda rows: None,
) -> tuple[Reference, Scores]:
    """What the expert says about every row, in the compact form, and its own scores.

    Args:
        model: the expert.
        kind: what it is.
        items: its rows.
        labels: of the rows, where a classifier's have any.
        seen: called with the number of rows of each batch that is done.

    Returns:
        For each row a dictionary. Language: `top` int64 and `logp` float32, both (positions, k),
        and `rest` float32 (positions,), the log-probability of all other tokens together.
        Classifier: `logp` float32 (classes,). Encoder: `state` and `centre` float64 (width,), the
        mean over positions, and that one's mean over all rows. And the scores, as `score` gives
        them.

    Raises:
        PaveError: the model's outputs hold NaN.
    """
    found: Reference = [{}] * len(items)
    own: list[dict[str, float]] = [{}] * len(items)
    for indices, output in _outputs(model, kind, items):
        for i, row in zip(indices, output, strict=True):
            if kind == "encoder":
                # It is at no distance from itself.
                found[i], own[i] = {"state": row.double().mean(0)}, {"distance": 0.0}
                continue
            found[i] = _compact(row) if kind == "language" else {"logp": row.log_softmax(-1)}
            own[i] = _of_row(kind, row, items[i], found[i], None if labels is None else labels[i])
        seen(len(indices))
    if kind == "encoder":
        centre = torch.stack([row["state"] for row in found]).mean(0)
        found = [{**row, "centre": centre} for row in found]
    return found, _gathered(own)


def score(
    model: PreTrainedModel, kind: Kind, items: Sequence[Item], expert: Reference,
    labels: Sequence[int] | None = None, seen: Callable[[int], object] = lambda rows: None,
) -> Scores:
    """Scores of every row, `(rows,)` float64 each; arguments as in `reference`.

    Raises:
        PaveError: the model's outputs hold NaN, or are of another size than the expert's.
    """
    found: list[dict[str, float]] = [{}] * len(items)
    for indices, output in _outputs(model, kind, items):
        for i, row in zip(indices, output, strict=True):
            label = None if labels is None else labels[i]
            found[i] = _of_row(kind, row, items[i], expert[i], label)
        seen(len(indices))
    return _gathered(found)


def _of_row(
    kind: Kind, output: Tensor, item: Item, expert: dict[str, Tensor], label: int | None
) -> dict[str, float]:
    if kind == "language":
        return _language(output, _targets(item), expert)
    return _classifier(output, expert, label) if kind == "classifier" else _encoder(output, expert)


def _gathered(rows: Sequence[dict[str, float]]) -> Scores:
    scores = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    if not all(np.isfinite(values).all() for values in scores.values()):
        raise PaveError(
            "The model's outputs hold NaN or Inf; lower the strength if it is a merge, else "
            "download or save it again.")
    return scores


def _outputs(
    model: PreTrainedModel, kind: Kind, items: Sequence[Item]
) -> Iterator[tuple[list[int], Tensor]]:
    """Row numbers of a batch, with logits or last hidden states, float32 on the CPU."""
    network: Any = model.base_model if kind == "encoder" else model
    work = list(stacked(items, lambda size: max(1, min(32, BATCH_TOKENS // size))))
    found = outputs(network, [batch for _, batch in work])
    for (indices, _), output in zip(work, found, strict=True):
        wanted = output.last_hidden_state if kind == "encoder" else output.logits
        if kind == "encoder" and wanted.ndim == 4:  # a convolutional network's (rows, c, h, w)
            wanted = wanted.flatten(2).mT
        yield indices, wanted.float().cpu()


def _targets(item: Item) -> Tensor:
    """The tokens that a language model predicts one from the other, `(length,)`."""
    return item["decoder_input_ids"] if "decoder_input_ids" in item else item["input_ids"]


def _compact(logits: Tensor) -> dict[str, Tensor]:
    logp = logits[:-1].log_softmax(-1)
    kept, top = logp.topk(min(TOP, logp.shape[-1]), dim=-1)
    return {"top": top, "logp": kept, "rest": _rest(logp, top)}


def _rest(logp: Tensor, top: Tensor) -> Tensor:
    """Log-probability of all tokens but `top` together, -inf where there are no others."""
    return logp.scatter(-1, top, -torch.inf).logsumexp(-1)


def _language(logits: Tensor, tokens: Tensor, expert: dict[str, Tensor]) -> dict[str, float]:
    logp = logits[:-1].log_softmax(-1)
    top = expert["top"]
    if int(max(top.max(), tokens.max())) >= logp.shape[-1]:
        raise PaveError(
            f"The model has {logp.shape[-1]} tokens in its vocabulary, fewer than the expert; "
            "evaluate merges that keep the experts' vocabulary.")
    loss = -logp.gather(-1, tokens[1:, None].to(logp.device))[:, 0]
    p = torch.cat([expert["logp"], expert["rest"][:, None]], -1)
    q = torch.cat([logp.gather(-1, top), _rest(logp, top)[:, None]], -1)
    return {
        "loss": loss.double().mean().item(),
        "kl": _divergence(p, q).mean().item(),
        "agreement": (logp.argmax(-1) == top[:, 0]).double().mean().item(),
    }


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """`sum p (log p - log q)` of log-probabilities (..., k): float64 (...,)."""
    p, q = p.double(), q.double()
    # Where p has no mass, nothing is added, whatever q is.
    return torch.where(p == -torch.inf, 0, p.exp() * (p - q)).sum(-1)


def _classifier(
    logits: Tensor, expert: dict[str, Tensor], label: int | None
) -> dict[str, float]:
    p, q = expert["logp"], logits.log_softmax(-1)
    found = {"kl": _divergence(p, q).item(), "agreement": float(p.argmax() == q.argmax())}
    return found if label is None else {**found, "accuracy": float(int(q.argmax()) == label)}


def _encoder(states: Tensor, expert: dict[str, Tensor]) -> dict[str, float]:
    wanted, centre = expert["state"], expert["centre"]
    found = states.double().mean(0)
    if found.shape != wanted.shape:
        raise PaveError(
            f"The model's last hidden state has {len(found)} features and the expert's "
            f"{len(wanted)}: they cannot be compared.")
    cosine = torch.cosine_similarity(found - centre, wanted - centre, dim=0)
    return {"distance": max(0.0, 1 - cosine.item())}


def head_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers of a model outside its body, which a merge does not share."""
    prefix = model.base_model_prefix + "."
    return {name: value.detach().clone() for name, value in model.state_dict().items()
            if not name.startswith(prefix)}


def put_head(model: nn.Module, head: dict[str, Tensor]) -> None:
    """Give `model` the head of an expert, in place.

    Raises:
        PaveError: the model has no such head, or one that is not held in memory.
    """
    own = model.state_dict()
    for name, value in head.items():
        if name not in own or own[name].shape != value.shape or own[name].is_meta:
            raise PaveError(
                f"The head of the expert ({name}) does not fit the merged model; evaluate merges "
                "of one architecture, with memory for all weights.")
        with torch.no_grad():
            own[name].copy_(value)
