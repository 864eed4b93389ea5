"""Systems of second moments in float64, solved in blocks, against the library's."""

from __future__ import annotations

import pytest
import torch

from mergekit_pave.algebra.numeric import BLOCK, cholesky, finite, solved


def moment(width: int, rows: int) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).double()
    return x.T @ x / rows


@pytest.mark.parametrize("width", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 50])
def test_blocks_give_the_whole_factor(width):
    c = moment(width, 2 * width + 3)
    right = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(cholesky(c.clone()).tril(), torch.linalg.cholesky(c))
    torch.testing.assert_close(solved(c.clone(), right), right @ torch.linalg.inv(c))


@pytest.mark.parametrize("width", [20, 2 * BLOCK + 50])
def test_one_that_has_not_full_rank_is_damped_by_the_least_that_serves(width):
    c = moment(width, width // 2)
    c -= 1e-8 * c.diagonal().mean() * torch.eye(width)  # what rounding may leave
    factor = cholesky(c.clone()).tril()
    added = factor @ factor.T - c
    assert torch.allclose(added.diagonal(), 1e-7 * c.diagonal().mean(), rtol=1e-3)
    assert (added - added.diagonal().diag()).abs().max() < 1e-12


@pytest.mark.parametrize("bad", [-torch.eye(3), torch.full((3, 3), torch.nan)])
def test_what_is_no_second_moment_is_refused(bad):
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        cholesky(bad.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_entry_that_is_no_number_is_seen(dtype):
    largest = torch.finfo(dtype).max
    assert finite(torch.tensor([[largest, -largest], [0.0, largest]], dtype=dtype))
    assert finite(torch.zeros(0, 3, dtype=dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        tensor = torch.zeros(70, 70, dtype=dtype)
        tensor[61, 3] = bad
        assert not finite(tensor)
