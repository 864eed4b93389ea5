"""What is read from a model's shards."""

from __future__ import annotations

from collections import Counter

from accelerate.utils.offload import OffloadedWeightsLoader


def reads(monkeypatch) -> Counter[str]:
    """How often each weight is read from its shard, counted from now on."""
    read: Counter[str] = Counter()
    real = OffloadedWeightsLoader.__getitem__

    def counted(self, key):
        read[key] += 1
        return real(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    return read
