"""Mean pooling, a linear head, and plain full fine-tuning: all the training there is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tasks import Rows
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 64
BATCH_SIZE = 32
EPOCHS = 1
ENCODER_LR = 2e-4
HEAD_LR = 1e-3


class Classifier(nn.Module):
    """An encoder and the linear head of one task, on the mean of the token vectors."""

    def __init__(self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head=None):
        super().__init__()
        self.encoder, self.tokenizer, self.head = encoder, tokenizer, head

    def features(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        mask = inputs["attention_mask"][..., None]
        states = self.encoder(**inputs).last_hidden_state
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    @torch.no_grad()
    def all_features(self, texts: list[str]) -> Tensor:
        self.eval()
        order = list(batches(texts))
        rows = torch.cat([self.features([texts[i] for i in batch]) for batch in order])
        return rows[torch.tensor([i for batch in order for i in batch]).argsort()]

    def accuracy(self, rows: Rows) -> float:
        texts, labels = rows
        with torch.no_grad():
            guesses = self.head(self.all_features(texts)).argmax(dim=1)
        return (guesses == torch.tensor(labels)).float().mean().item()


def batches(texts: list[str], generator: torch.Generator | None = None) -> Iterator[list[int]]:
    """Row numbers in batches of like length, which wastes little on padding.

    A generator shuffles: which rows share a batch (within a window), and the batches.
    """
    order = torch.arange(len(texts))
    if generator is not None:
        order = torch.randperm(len(texts), generator=generator)
    window = len(texts) if generator is None else 16 * BATCH_SIZE
    result = []
    for start in range(0, len(texts), window):
        rows = sorted(order[start : start + window].tolist(), key=lambda i: len(texts[i]))
        result += [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
    if generator is not None:
        result = [result[i] for i in torch.randperm(len(result), generator=generator).tolist()]
    return iter(result)


def fit_head(features: Tensor, labels: list[int], steps: int = 200) -> nn.Linear:
    """A linear head on fixed features, by full-batch steps."""
    target = torch.tensor(labels)
    head = nn.Linear(features.shape[1], int(target.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=2.0)
    for _ in range(steps):
        nn.functional.cross_entropy(head(features), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


def fine_tune(
    model: Classifier, rows: Rows, seed: int, epochs: int = EPOCHS, encoder_lr: float = ENCODER_LR
) -> Iterator[str]:
    """Train encoder and head; yields a line of progress now and then."""
    texts, labels = rows
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    plan = [batch for _ in range(epochs) for batch in batches(texts, generator)]
    optimizer = torch.optim.AdamW(
        [
            {"params": model.encoder.parameters(), "lr": encoder_lr},
            {"params": model.head.parameters(), "lr": HEAD_LR},
        ],
        weight_decay=0.01,
        fused=True,
    )
    warmup = len(plan) // 10 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(plan) - step) / (len(plan) - warmup))
    )
    model.train()
    running = 0.0
    for step, batch in enumerate(plan, start=1):
        logits = model.head(model.features([texts[i] for i in batch]))
        loss = nn.functional.cross_entropy(logits, torch.tensor([labels[i] for i in batch]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += loss.item()
        if step % 25 == 0:
            yield f"step {step}/{len(plan)}, loss {running / 25:.2f}"
            running = 0.0
    model.eval()
