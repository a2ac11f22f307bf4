"""Lanczos with deflation: leading eigenpairs of large symmetric matrices, with their multiplicities."""

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from ssl_runner.theory.matrices import TIE_TOLERANCE

MAX_EXTRA_VECTORS = 256  # vectors beyond k that are sought; a larger eigenspace is truncated
MAX_PRODUCTS = 10_000  # approximate number of matrix-vector products per call of ARPACK
MAX_ENTRIES_PER_ROW = 8  # average; denser matrices are not inverted


def lanczos(
    A: scipy.sparse.csr_array | scipy.sparse.linalg.LinearOperator,
    known: np.ndarray,
    k: int,
    top: float,
    spread: float,
    smallest: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenpairs of A (m, m) above `smallest`, orthogonal to known eigenvectors (m, r).

    Returns values (s,) in descending order and vectors (m, s): the k largest, or all if there are fewer, and
    those that are tied with the k-th. All eigenvalues of A must be at most `top`, and within `spread` of the
    largest. Raises ValueError if ARPACK finds no eigenpair.

    ARPACK may return only one vector of a multiple eigenvalue. It is therefore called again on the complement
    of all vectors found, until the next value is smaller than the k-th, it does not converge, or
    MAX_EXTRA_VECTORS vectors are found beyond k. It does not converge if eigenvalues are dense at the end of
    the spectrum, as for paths and grids. A matrix with few entries is then inverted around `top`.
    """
    m, r = known.shape
    tie, shift = TIE_TOLERANCE * max(1.0, abs(top)), top + 1e-7 * max(1.0, abs(top))
    found, values, number, inverse = known, np.empty(0), k, None
    while found.shape[1] < min(m, r + k + MAX_EXTRA_VECTORS):
        operator = deflated(A, found, spread) if inverse is None else deflated_inverse(inverse, found)
        try:
            new, vectors = arpack_largest(
                operator, min(number, m - found.shape[1], m - 1), seed=found.shape[1]
            )
        except scipy.sparse.linalg.ArpackError as error:
            if inverse is None and scipy.sparse.issparse(A) and A.nnz <= MAX_ENTRIES_PER_ROW * m:
                inverse = scipy.sparse.linalg.splu(
                    scipy.sparse.csc_array(shift * scipy.sparse.eye_array(m) - A)
                )
                continue
            if len(values):
                break
            raise ValueError(
                f"{k} leading eigenvectors of a component of {m} rows: ARPACK found none ({error}); lower K"
            ) from error
        if inverse is not None:
            new = shift - 1 / new
        kth = np.sort(values)[-k] if len(values) >= k else -np.inf
        if new.max() < max(kth - tie, smallest):
            break
        vectors, _ = np.linalg.qr(vectors - found @ (found.T @ vectors))
        found, values = np.concatenate([found, vectors], 1), np.concatenate([values, new])
        number = 1 if len(values) == k else 2 * number
    order = np.argsort(-values)
    if len(order):
        order = order[values[order] >= max(values[order[min(k, len(order)) - 1]] - tie, smallest)]
    return values[order], found[:, r:][:, order]


def deflated(
    A: scipy.sparse.csr_array | scipy.sparse.linalg.LinearOperator, found: np.ndarray, spread: float
) -> scipy.sparse.linalg.LinearOperator:
    """A (m, m) with the eigenvalues of the vectors found (m, r) lowered by `spread`."""

    def product(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(found), -1)
        return A @ x - spread * (found @ (found.T @ x))

    return scipy.sparse.linalg.LinearOperator(A.shape, product, matmat=product, dtype=float)


def deflated_inverse(
    inverse: scipy.sparse.linalg.SuperLU, found: np.ndarray
) -> scipy.sparse.linalg.LinearOperator:
    """Inverse of a factorised matrix (m, m), with eigenvalue 0 for the vectors found (m, r)."""

    def product(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(found), -1)
        y = inverse.solve(x - found @ (found.T @ x))
        return y - found @ (found.T @ y)

    return scipy.sparse.linalg.LinearOperator(inverse.shape, product, matmat=product, dtype=float)


def arpack_largest(
    operator: scipy.sparse.linalg.LinearOperator, k: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """k largest eigenpairs. Raises ArpackError if ARPACK does not converge within MAX_PRODUCTS."""
    m = operator.shape[0]
    ncv = min(m, max(2 * k + 1, 100))
    start = np.random.default_rng(seed).standard_normal(m)
    return scipy.sparse.linalg.eigsh(
        operator, k, which="LA", v0=start, ncv=ncv, maxiter=max(MAX_PRODUCTS // ncv, 10)
    )
