"""The CUDA paths against the CPU ones (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch
from helpers import config_of, merge, reference, source_of, spec_of, worst

from mergekit_pave.algebra import subspace
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.run import calibrate_to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
def test_tail_agrees_with_the_cpu(shape):
    torch.manual_seed(0)
    w = torch.randn(shape) * torch.logspace(0, -2, shape[1])
    x = torch.randn(2000, shape[1]) @ torch.randn(shape[1], shape[1])
    c = subspace.damped(x.T @ x / len(x), dampening_frac=0.01)
    there = subspace.tail(w.cuda(), c.cuda(), 8)
    here = subspace.tail(w, c, 8)
    torch.testing.assert_close(there.values.cpu(), here.values, rtol=1e-4, atol=0)
    removed = w - subspace.purify(w, here.basis)
    error = subspace.purify(w.cuda(), there.basis).cpu() - subspace.purify(w, here.basis)
    assert error.norm() <= 1e-4 * removed.norm()


def test_calibration_on_the_gpu(families, texts, tmp_path):
    path, spec = families("llama")["expert0"], spec_of(texts[0])
    resources = Resources(torch.device("cuda"))
    store = calibrate_to(source_of(path), spec, tmp_path / "store", resources)
    assert worst(store, reference(path, "llama", spec)) < 1e-3


@pytest.mark.parametrize("options", [{"cuda": True}, {"cuda": True, "low_cpu_memory": True},
                                     {"gpu_rich": True}])
def test_merges_on_the_gpu(families, texts, tmp_path, options):
    config = config_of(families("llama"), "pave_task_arithmetic", texts, rank_ratio=0.9)
    here = merge(config, tmp_path / "cpu")
    there = merge(config, tmp_path / "cuda", **options)
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=1e-3, atol=1e-3)
