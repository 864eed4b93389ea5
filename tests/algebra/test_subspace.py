import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_pave.algebra import subspace
from mergekit_pave.algebra.subspace import Tail, damped, purify, spectrum, tail


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost these small matrices more than they bring, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


needs_extended = pytest.mark.skipif(not oracle.EXTENDED, reason="longdouble is double here")


def orthogonal(n, rng):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def covariance_of(width, condition, rng):
    """Positive definite with the given condition number, eigenvalues spread evenly in log."""
    q = orthogonal(width, rng)
    c = (q * np.geomspace(1, 1 / condition, width)) @ q.T
    return torch.from_numpy((c + c.T) / 2)


def weight_of(out, width, kind, rng):
    w = rng.standard_normal((out, width))
    rank = min(out, width)
    if kind == "clustered":
        values = np.repeat([1.0, 0.5, 0.5 + 1e-9, 0.1], -(-rank // 4))[:rank]
        w = orthogonal(out, rng)[:, :rank] * values @ orthogonal(width, rng)[:rank]
    elif kind == "repeated":
        w = orthogonal(out, rng)[:, :rank] @ orthogonal(width, rng)[:rank]
    elif kind == "deficient":
        w = w[:, : rank // 2] @ rng.standard_normal((rank // 2, width))
    elif kind == "zero rows":
        w[::3] = 0
    elif kind == "zero":
        w[:] = 0
    elif kind == "graded":
        w *= np.geomspace(1, 1e-3, out)[:, None]
    return torch.from_numpy(w)


KINDS = ("plain", "clustered", "repeated", "deficient", "zero rows", "zero", "graded")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@st.composite
def problems(draw, most=12):
    """(weight, damped covariance, count)"""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    c = covariance_of(width, 10 ** draw(st.floats(0, 6)), rng)
    if width > 1 and draw(st.booleans()):
        c[width // 2] = c[:, width // 2] = 0  # an input that never fires
        c = damped(c, regularization=0.01)
    w = weight_of(out, width, draw(st.sampled_from(KINDS)), rng).to(draw(st.sampled_from(DTYPES)))
    return w, c, draw(st.integers(0, min(out, width) - 1))


def activated(weight, c, basis):
    """`||U U^T W C||_F^2`, what dropping `basis` costs on the model's own data."""
    image = np.asarray(basis.T, np.longdouble) @ np.asarray(weight.double(), np.longdouble)
    return ((image @ np.asarray(c, np.longdouble)) ** 2).sum()


def check_against_oracle(w, c, found: Tail, largest=1e-10):
    count = found.basis.shape[1]
    truth = oracle.purified(w.double(), c, count)
    rank, top = len(truth.values), truth.values[0]
    floor = count * (1e-13 * top) ** 2
    best = (truth.values[rank - count :] ** 2).sum()
    assert activated(w, c, found.basis) <= best * (1 + 1e-6) + floor
    assert found.largest == pytest.approx(float(top), rel=largest)
    np.testing.assert_allclose(
        found.values, truth.values[::-1][:count].astype(float), rtol=1e-6, atol=float(1e-13 * top)
    )
    gram = found.basis.mT @ found.basis
    torch.testing.assert_close(gram, torch.eye(count).double(), atol=1e-12, rtol=0)
    clear = count and truth.values[rank - count - 1] > 1.01 * truth.values[rank - count]
    if clear and truth.values[rank - count - 1] > 1e-8 * top:
        removed = (w.double() - purify(w.double(), found.basis)).numpy()
        error = np.linalg.norm((removed - truth.removed).astype(float))
        size = np.linalg.norm(truth.removed.astype(float))
        assert error <= 1e-6 * size + 1e-13 * np.linalg.norm(w.double())


@needs_extended
@settings(max_examples=150, deadline=None)
@given(problems())
def test_direct_route_matches_the_paper_s_formula(problem):
    w, c, count = problem
    found = tail(w, c, count)
    assert found.route == "direct"
    check_against_oracle(w, c, found)


@needs_extended
@settings(max_examples=100, deadline=None)
@given(problem=problems(most=24), seed=st.integers(0, 9))
def test_iteration_or_its_fallback_matches_the_paper_s_formula(problem, seed):
    w, c, count = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subspace, "DIRECT_BELOW", 0)
        patch.setattr(subspace, "DIRECT_FRACTION", 1)
        found = tail(w, c, count, seed=seed)
    # Float32 "repeated" values differ by 1e-8, and no iteration tells the largest from the rest.
    check_against_oracle(w, c, found, largest=1e-7)


@needs_extended
@pytest.mark.parametrize("out, width, condition", [
    (144, 144, 1e2), (144, 144, 1e6), (136, 160, 1e6), (160, 136, 1e6),
])  # fmt: skip
def test_iteration_matches_the_paper_s_formula(out, width, condition):
    rng = np.random.default_rng(out + width)
    w = weight_of(out, width, "plain", rng).float()
    c = covariance_of(width, condition, rng)
    found = tail(w, c, 9)
    assert found.route == "iterative"
    check_against_oracle(w, c, found)


def example(out=40, width=30, seed=0, condition=1e3, kind="plain"):
    rng = np.random.default_rng(seed)
    return weight_of(out, width, kind, rng), covariance_of(width, condition, rng)


SHAPES = pytest.mark.parametrize("out, width", [(30, 30), (40, 30), (30, 40), (160, 160)])


@SHAPES
def test_no_random_competitor_is_activated_less(out, width):
    w, c = example(out, width)
    best = activated(w, c, tail(w, c, 4).basis)
    image = np.linalg.qr(w.numpy())[0] if out > width else np.eye(out)
    rng = np.random.default_rng(1)
    for _ in range(50):
        basis = image @ np.linalg.qr(rng.standard_normal((image.shape[1], 4)))[0]
        assert best < activated(w, c, torch.from_numpy(basis))
    near = tail(w, c, 4).basis + 1e-3 * torch.from_numpy(rng.standard_normal((out, 4)))
    if out <= width:
        assert best < activated(w, c, torch.linalg.qr(near).Q)


@SHAPES
def test_nearly_right_is_told_from_right(out, width):
    """The negative control: the paper's own route in float32, and the wrong subspace, fail."""
    w, c = example(out, width, condition=1e6)
    truth = oracle.purified(w, c, 4)
    wrong = tail(w, c, 4, subspace="svd")
    with pytest.raises(AssertionError):
        check_against_oracle(w, c, wrong)
    u, s, v = torch.linalg.svd((w @ c).float(), full_matrices=False)
    paper = (u[:, :-4] * s[:-4] @ v[:-4] @ torch.linalg.inv(c.float())).double().numpy()
    error = np.linalg.norm((paper - truth.weight).astype(float))
    assert error > 1e-4 * np.linalg.norm(truth.removed.astype(float))


@SHAPES
def test_purifying_twice_is_purifying_once(out, width):
    w, c = example(out, width)
    basis = tail(w, c, 5).basis
    once = purify(w, basis)
    torch.testing.assert_close(purify(once, basis), once, atol=1e-13, rtol=0)
    again = tail(once, c, 5)
    torch.testing.assert_close(purify(once, again.basis), once, atol=1e-9, rtol=0)


@SHAPES
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_data_and_of_the_weight_do_not_matter(out, width, scale):
    w, c = example(out, width)
    found, scaled = tail(w, c, 3), tail(scale * w, scale * c, 3)
    torch.testing.assert_close(purify(w, scaled.basis), purify(w, found.basis))
    torch.testing.assert_close(scaled.normalised, found.normalised, rtol=1e-9, atol=0)


@SHAPES
def test_identity_covariance_is_plain_svd(out, width):
    w, _ = example(out, width)
    by_identity = tail(w, torch.eye(width).double(), 3)
    plain = tail(w, None, 3, subspace="svd")
    torch.testing.assert_close(purify(w, by_identity.basis), purify(w, plain.basis))
    torch.testing.assert_close(plain.values, torch.linalg.svdvals(w).flip(0)[:3])
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(purify(w, plain.basis), u[:, :-3] * s[:-3] @ v[:-3])


@SHAPES
def test_random_directions_are_seeded_orthonormal_and_reachable(out, width):
    w, c = example(out, width)
    found = tail(w, c, 5, subspace="random", seed=3)
    assert torch.equal(found.basis, tail(w, None, 5, subspace="random", seed=3).basis)
    assert not torch.equal(found.basis, tail(w, c, 5, subspace="random", seed=4).basis)
    torch.testing.assert_close(found.basis.mT @ found.basis, torch.eye(5).double())
    inside = w @ torch.linalg.lstsq(w, found.basis).solution
    torch.testing.assert_close(inside, found.basis)
    assert found.values.unique().numel() == 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_dropping_nothing_returns_the_weight(dtype):
    w, c = example()
    found = tail(w.to(dtype), c, 0)
    assert found.basis.shape == (40, 0) and found.values.shape == (0,)
    kept = purify(w.to(dtype), found.basis)
    assert torch.equal(kept, w.to(dtype).to(kept.dtype))
    assert kept.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_float32_purification_is_exact_to_float32():
    w, c = example(160, 200)
    basis = tail(w.float(), c, 5).basis
    exact = purify(w.float().double(), basis)
    torch.testing.assert_close(purify(w.float(), basis).double(), exact, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["deficient", "zero rows", "zero", "repeated"])
@pytest.mark.parametrize("out, width", [(160, 160), (180, 160), (160, 180)])
def test_degenerate_weights_of_iterative_size(out, width, kind):
    w, c = example(out, width, kind=kind)
    found = tail(w, c, 6)
    exact = torch.linalg.svdvals(w @ c)
    best, floor = (exact[-6:] ** 2).sum(), 6 * (1e-13 * exact[0]) ** 2
    assert activated(w, c, found.basis) <= best * (1 + 1e-6) + floor
    if kind in ("deficient", "zero rows"):
        assert found.route == "fallback"
        torch.testing.assert_close(purify(w, found.basis), w, atol=1e-10, rtol=0)


def test_the_seed_of_the_iteration_does_not_show():
    w, c = example(200, 160)
    first, second = (tail(w, c, 6, seed=seed) for seed in (0, 1))
    assert first.route == "iterative"
    torch.testing.assert_close(purify(w, first.basis), purify(w, second.basis), atol=1e-6, rtol=0)
    assert torch.equal(first.basis, tail(w, c, 6, seed=0).basis)


def test_an_iteration_that_gives_up_falls_back(monkeypatch):
    w, c = example(160, 160)
    expected = tail(w, c, 6)
    monkeypatch.setattr(subspace, "MAX_APPLIES", 2)
    found = tail(w, c, 6)
    assert (expected.route, found.route) == ("iterative", "fallback")
    torch.testing.assert_close(found.values, expected.values)


@SHAPES
def test_spectrum_agrees_with_tail(out, width):
    w, c = example(out, width)
    found, values = tail(w, c, 4), spectrum(w, c)
    assert len(values) == min(out, width)
    torch.testing.assert_close(values.flip(0)[:4], found.values)
    assert found.largest == pytest.approx(values[0].item(), rel=1e-10)
    torch.testing.assert_close(spectrum(w, subspace="svd"), torch.linalg.svdvals(w))
    assert spectrum(w, subspace="random").unique().numel() == 1


def test_damping():
    c = torch.tensor([[4.0, 2.0], [2.0, 0.0]])
    expected = torch.tensor([[4.5, 2.0], [2.0, 0.5]]).double()
    assert torch.equal(damped(c, regularization=0.5), expected)
    assert torch.equal(damped(c, dampening_frac=0.25), expected)
    assert torch.equal(c, torch.tensor([[4.0, 2.0], [2.0, 0.0]])), "the argument is left alone"
    one = torch.eye(2).double()
    assert torch.equal(damped(one, regularization=0.5), 1.5 * one)
    assert torch.equal(one, torch.eye(2).double())


@pytest.mark.parametrize(
    "covariance, arguments, message",
    [
        (torch.eye(2), {}, "either"),
        (torch.eye(2), {"dampening_frac": 0.1, "regularization": 0.1}, "either"),
        (torch.ones(2, 3), {"regularization": 0.1}, "square"),
        (torch.tensor([[torch.nan]]), {"regularization": 0.1}, "NaN"),
        (torch.tensor([[torch.inf]]), {"regularization": 0.1}, "NaN or inf"),
        (torch.zeros(2, 2), {"regularization": 0.1}, "empty"),
    ],
)
def test_unusable_covariances(covariance, arguments, message):
    with pytest.raises(ValueError, match=message):
        damped(covariance, **arguments)


@pytest.mark.parametrize(
    "weight, covariance, count, kind, message",
    [
        (torch.eye(3), torch.eye(3), 3, "covariance", "count"),
        (torch.eye(3), torch.eye(3), -1, "covariance", "count"),
        (torch.eye(3), torch.eye(2), 1, "covariance", "covariance; got"),
        (torch.eye(3), None, 1, "covariance", "got None"),
        (torch.eye(3), None, 1, "pca", "subspace"),
        (torch.ones(3), None, 1, "svd", "matrix"),
        (torch.ones(3, 3, dtype=torch.int8), None, 1, "svd", "matrix"),
        (torch.full((3, 3), torch.nan), None, 1, "svd", "NaN"),
    ],
)
def test_misuse_of_tail(weight, covariance, count, kind, message):
    with pytest.raises(ValueError, match=message):
        tail(weight, covariance, count, subspace=kind)


def test_misuse_of_purify():
    with pytest.raises(ValueError, match="does not fit"):
        purify(torch.eye(3), torch.ones(2, 1))


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    w, c = example(300, 200)
    here, there = tail(w, c, 6), tail(w.cuda(), c.cuda(), 6)
    assert there.basis.is_cuda and there.route == here.route == "iterative"
    removed = w.cuda() - purify(w.cuda(), there.basis)
    torch.testing.assert_close(removed.cpu(), w - purify(w, here.basis), atol=1e-8, rtol=0)
