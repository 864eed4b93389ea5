"""A causal language model writes text: how a row begins, goes on and ends, and the sampling.

Rows are ancestral samples: every token is drawn from the model's own distribution, at
temperature 1 and from the whole vocabulary, whatever the checkpoint's generation_config.json
would rather have. Each row has a random stream of its own, so that it does not depend on
which rows share a batch with it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
)

from mergekit_pave.calibration.chat import written
from mergekit_pave.calibration.collect import NotFinite, input_device
from mergekit_pave.calibration.limits import length_limit, refuse_unless_causal
from mergekit_pave.calibration.load import Resources, load_model
from mergekit_pave.calibration.samples import Samples, load_tokenizer, make_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import ModelSource, culprit
from mergekit_pave.recipe.parameters import GENERATED, CalibrationSpec
from mergekit_pave.storage.files import (
    cache_folder,
    locked,
    make_folder,
    scratch,
    write_text,
)

logger = logging.getLogger(__name__)
# Stands for the user's words in a chat template; no space, or the template might trim it.
_WORDS = "mergekitpave"


@dataclass(frozen=True)
class Form:
    """The fixed tokens of a row; the model draws all others.

    Attributes:
        opening: the tokens that every row begins with.
        bridge: from the token that ends the user's turn to where the assistant's text begins;
            empty when a row ends with its first end token.
        ends: tokens that end a text or a turn.
        chat: whether it comes from a chat template.
    """

    opening: tuple[int, ...]
    bridge: tuple[int, ...]
    ends: tuple[int, ...]
    chat: bool = False

    def forced(self, row: Sequence[int]) -> int | None:
        """The next token of `row` where that is not for the model to choose."""
        turn = self._end(row, len(self.opening))
        if turn is None or not self._goes_on(row[turn]):
            return None
        done = len(row) - turn
        return self.bridge[done] if done < len(self.bridge) else None

    def length(self, row: Sequence[int]) -> int | None:
        """How many tokens of `row` belong to it, its end token included; `None`: no end yet."""
        end = self._end(row, len(self.opening))
        if end is not None and self._goes_on(row[end]):
            end = self._end(row, end + len(self.bridge))
        return None if end is None else end + 1

    def _goes_on(self, end: int) -> bool:
        return bool(self.bridge) and end == self.bridge[0]

    def _end(self, row: Sequence[int], start: int) -> int | None:
        return next((i for i in range(start, len(row)) if row[i] in self.ends), None)


def form_of(
    tokenizer: Any, config: PreTrainedConfig, generation: GenerationConfig, model: str
) -> Form:
    """A user's turn of the chat template, which the model fills and then answers, if it has one.

    Else text behind the token that begins one (BOS, or the end token that separates texts).

    Raises:
        PaveError: there is no such token.
    """
    text = config.get_text_config()
    ends = _tokens(tokenizer.eos_token_id, generation.eos_token_id, text.eos_token_id)
    if tokenizer.chat_template is not None:
        try:
            return _chat(tokenizer, ends)
        except Exception as error:  # whatever a template cannot do with this one message
            logger.info("The chat template of %s shows no user's turn: %s", model, error)
    starts = _tokens(tokenizer.bos_token_id, text.bos_token_id) or ends
    if not starts:
        raise PaveError(
            f"{model} has no token that begins or ends a text, so it cannot generate any; set "
            "bos_token_id in its config.json, or name a dataset.")
    return Form(starts[:1], (), ends)


def _tokens(*found: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids in their order, each once; configurations hold one, several or none."""
    flat = [i for ids in found if ids is not None for i in ([ids] if isinstance(ids, int) else ids)]
    return tuple(dict.fromkeys(flat))


def _chat(tokenizer: Any, ends: tuple[int, ...]) -> Form:
    text = written(tokenizer, [{"role": "user", "content": _WORDS}], add_generation_prompt=True)
    before, words, after = text.partition(_WORDS)
    if not words:
        raise ValueError("it does not write the message as it is")
    # A space in front of a word is part of the word's token, which the model draws.
    opening, bridge = (
        tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) if part else ()
        for part in (before.rstrip(" "), after))
    if not opening:
        raise ValueError("nothing stands before the message")
    # Where a turn ends in plain characters ([/INST]) the model writes them itself and goes on.
    turn = next((i for i, token in enumerate(bridge) if token in ends), len(bridge))
    return Form(opening, bridge[turn:], ends, chat=True)


def write_rows(
    model: PreTrainedModel, form: Form, count: int, length: int, seed: int, batch_size: int,
    label: str,
) -> list[list[int]]:
    """`count` rows of token ids, each the form's opening and up to `length` tokens more.

    Raises:
        NotFinite: the model's logits hold NaN.
    """
    # This replaces all settings of the checkpoint, such as penalties, by their defaults.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=length, use_cache=True)
    rows: list[list[int]] = []
    steps = length * -(-count // batch_size)
    writer: Any = model  # its type hides `generate`
    with tqdm(total=steps, desc=f"Generating text of {label}", unit="token") as progress:
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            draws = [random.Random(f"{seed}/{number}") for number in numbers]
            ids = torch.tensor([form.opening] * len(draws), device=input_device(model))
            with torch.inference_mode():
                written = writer.generate(
                    ids, attention_mask=torch.ones_like(ids),
                    logits_processor=[_Ancestral(form, draws, progress)],
                    stopping_criteria=[_Ended(form)])
            rows += [row[: form.length(row)] for row in written.tolist()]
            progress.update(length * (start // batch_size + 1) - progress.n)
    return rows


class _Ancestral(LogitsProcessor):
    """Leaves a single token of each row possible: the forced one, or one drawn from its stream.

    `generate` samples from a global stream, with draws that depend on the batch.
    """

    def __init__(self, form: Form, draws: Sequence[random.Random], progress: tqdm):
        self.form, self.draws, self.progress = form, draws, progress

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """`ids` (rows, length), `scores` (rows, vocabulary)."""
        logits = scores.cpu().double()
        if ids.shape[1] == len(self.form.opening):
            # A row must not end before its first token.
            logits[:, list(self.form.ends)] = -torch.inf
        tokens = _draw(logits, [draw.random() for draw in self.draws])
        for i, row in enumerate(ids.tolist()):
            forced = self.form.forced(row)
            tokens[i] = tokens[i] if forced is None else forced
        self.progress.update()
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(1, tokens[:, None].to(scores.device), 0)


def _draw(logits: Tensor, uniform: Sequence[float]) -> Tensor:
    """One token per row, `(rows,)`: where its share of the distribution's mass is reached."""
    mass = logits.softmax(-1).cumsum(-1)
    if mass[:, -1].isnan().any():
        raise NotFinite("its logits hold NaN; check that the model runs at all.")
    share = torch.tensor(uniform, dtype=mass.dtype)[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, share, right=True)[:, 0].clamp_(max=mass.shape[1] - 1)


class _Ended(StoppingCriteria):
    """Which rows are complete, `(rows,)`; `generate` stops when all are."""

    def __init__(self, form: Form):
        self.form = form

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = [self.form.length(row) is not None for row in ids.tolist()]
        return torch.tensor(ended, device=ids.device)


# Tokens drawn per row at most; each costs a forward pass.
LENGTH = 256
FORMAT = 1


def generated_samples(source: ModelSource, spec: CalibrationSpec, resources: Resources) -> Samples:
    """The rows that `spec` asks of this model, generated unless the cache has them.

    Raises:
        PaveError: no causal language model, or one that cannot begin a text.
    """
    config = source.config()
    refuse_unless_causal(config, source.label)
    tokenizer = load_tokenizer(source.tokenizer, source.loading)
    form = form_of(tokenizer, config, _generation(source, config), source.label)
    limit = length_limit(config, tokenizer, spec.max_seq_length)
    length = min(LENGTH, limit - len(form.opening))
    if length < 1:
        raise PaveError(
            f"{source.label} begins a text with {len(form.opening)} tokens, which leave no room "
            f"in the {limit} of max_seq_length or of the model; raise it, or name a dataset.")
    rows = _rows(source, spec, form, length, resources)
    logger.info("First sample of %s: %r", source.label, tokenizer.decode(rows[0][:64]))
    items = [{"input_ids": torch.tensor(row, dtype=torch.long)} for row in rows]
    return make_samples(items, spec, {
        "dataset": GENERATED,
        "generated": True,
        "local": False,
        "seed": spec.seed,
        "requested": spec.num_samples,
        "max_seq_length": len(form.opening) + length,
        "chat_template": form.chat,
    })


def _generation(source: ModelSource, config: PreTrainedConfig) -> GenerationConfig:
    """generation_config.json, where chat models name the ends of their turns."""
    try:
        return GenerationConfig.from_pretrained(source.path)
    except OSError:
        return GenerationConfig.from_model_config(config)


def _rows(
    source: ModelSource, spec: CalibrationSpec, form: Form, length: int, resources: Resources
) -> list[list[int]]:
    stamp = source.stamp()
    request = {
        "format": FORMAT, "model": source.identity(), "opening": form.opening,
        "bridge": form.bridge, "ends": form.ends, "length": length, "seed": spec.seed,
        "rows": spec.num_samples}
    key = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]
    folder = cache_folder() / "generated"
    path = folder / f"{key}.json"
    if (kept := _read(path)) is not None:
        return kept
    make_folder(folder)
    with locked(folder / f"{key}.lock"):
        if (kept := _read(path)) is not None:
            return kept
        with scratch(folder) as offloaded:
            rows = _generate(source, spec, form, length, resources, offloaded)
        source.refuse_changed(stamp)
        write_text(path, json.dumps({"request": request, "rows": rows}))
    return rows


def _read(path: Path) -> list[list[int]] | None:
    try:
        return json.loads(path.read_text("utf-8"))["rows"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PaveError(
            f"The generated text {path} cannot be read ({error}); delete it.") from error


def _generate(
    source: ModelSource, spec: CalibrationSpec, form: Form, length: int, resources: Resources,
    offloaded: Path,
) -> list[list[int]]:
    try:
        return write_rows(
            load_model(source, device=resources.device, max_memory=resources.max_memory,
                       scratch=offloaded, head=True),
            form, spec.num_samples, length, spec.seed, spec.batch_size, source.label)
    except NotFinite as error:
        raise PaveError(culprit(source) or f"{source.label}: {error}") from error
    finally:
        _release(resources.device)


def _release(device: torch.device) -> None:
    """Free the memory of the model, since the next one is placed by what is free then."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
