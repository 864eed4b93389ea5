"""Building empty models."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import transformers

from mergekit_pave.models.layers import empty_model


@pytest.fixture
def many_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_build_models_keep_their_dtypes(many_switches):
    # Without a class named, transformers builds in the config's dtype.
    configs = [transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=4,
        num_attention_heads=2, dtype=dtype) for dtype in ("bfloat16", "float16", "float32")]
    found = []

    def build(config) -> None:
        dtypes = {p.dtype for _ in range(10) for p in empty_model(config).parameters()}
        found.append(dtypes == {config.dtype})

    threads = [threading.Thread(target=build, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3
    assert torch.get_default_dtype() == torch.float32
