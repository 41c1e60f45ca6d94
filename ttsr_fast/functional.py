"""The two operations of the package: `search` and `gather_fold`.

This layer checks arguments and resolves defaults; the operators in `ttsr_fast.operators` choose a
backend and do the work.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttsr_fast.choices import PRECISIONS
from ttsr_fast.operators.gather_fold import call_gather_fold
from ttsr_fast.operators.patch import Patch, Score
from ttsr_fast.operators.search import call_search

KERNEL_SIZES = (1, 3, 5, 7)
NORMALIZATIONS = ("both", "key", "none")
DIVISORS = ("area", "overlap", "none")

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LOW_PRECISION = {torch.float16: "fp16", torch.bfloat16: "bf16"}


class Match(NamedTuple):
    """The best key patch of every query patch.

    Attributes:
        score: `[N, H, W]`, float32 (float64 for float64 inputs): the score of the best pair, a
            cosine similarity in [-1, 1] under `normalize="both"`.
        index: `[N, H, W]`, int64: row-major position of the best key patch in the key grid. It
            carries no gradient.
    """

    score: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name, not missed here


def search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    *,
    kernel_size: int = 3,
    padding: int | None = None,
    normalize: str = "both",
    eps: float = 1e-12,
    add_eps: bool = False,
    key_mask: Tensor | None = None,  # [N or 1, HK, WK] bool
    precision: str | None = None,
    backend: str | None = None,
) -> Match:
    r"""For every query patch, the key patch with the highest normalised inner product.

    The relevance embedding of TTSR (arXiv 2006.04139, equations 2 to 5): with :math:`q_j` and
    :math:`k_i` the `kernel_size x kernel_size` patches of `query` and `key`,

    .. math::
        r_{i,j} = \Big\langle \frac{q_j}{\|q_j\|}, \frac{k_i}{\|k_i\|} \Big\rangle, \qquad
        \text{score}_j = \max_i r_{i,j}, \qquad \text{index}_j = \arg\max_i r_{i,j}.

    Patches and the matrix r are never formed: memory is linear in the inputs.

    Args:
        query: `[N, C, H, W]`, float64, float32, float16 or bfloat16, any strides.
        key: `[N, C, HK, WK]`, or `[1, C, HK, WK]` for the whole batch; dtype and device of
            `query`.
        kernel_size: side of a patch: 1, 3, 5 or 7.
        padding: zeros around both maps, 0 to `kernel_size // 2` (the default, which gives one patch
            per pixel). 0 takes patches that lie wholly inside. A padded size P has P - kernel_size
            + 1 patch positions; those are the query grid and the key grid.
        normalize: which patches are divided by `max(norm, eps)`: `"both"` (cosine similarity),
            `"key"` (the same choice, scores scaled by the query's norm), `"none"` (inner product).
        eps: lower bound of a norm, so that an all-zero patch scores 0. A normal positive number;
            in float32 a norm below 1e-19 counts as 0.
        add_eps: divide by `norm + eps` instead, as C2-Matching (arXiv 2106.01863) does.
        key_mask: bool, `[N or 1, *key grid]`; a key position that is False is never matched. Every
            mask needs at least one True, which is checked on the CPU.
        precision: allowed error of the choice, as a contract on values:

            - `"fp32"` (default for float32): the score is within 1e-6 of the exact maximum.
            - `"fp16"`, `"bf16"` (default for inputs of that dtype and under autocast): the features
              may be rounded to that type for the choice. Its exact score is within 2**-9 (fp16) or
              2**-6 (bf16) of the maximum, times the norms that `normalize` leaves. The score
              returned is computed from the features as given, in float32.
            - `"fp16x3"`: float32 features as two float16 parts and three products of them. The
              score is within 1e-6 of the maximum for patches with a root mean square of at least
              2**-18 of the largest feature of their image, and less accurate in proportion below.
            - `"tf32"`: on GPUs, products of float32 features read 10 bits of them; the choice is
              within 2**-8 of the maximum. The score returned is exact as above.

            A backend may be more accurate than asked: on the CPU only `"bf16"` differs from
            `"fp32"`, where the processor multiplies bfloat16 (AMX, AVX512-BF16) and the maps are
            large enough for that to be faster. With AMX `"fp32"` multiplies bfloat16 parts, proves
            the choice, and searches what it cannot prove again. `certified` marks the choices that
            rounding cannot have changed. float64 inputs are searched in float64.
        backend: None chooses the fastest that can run; `"cpp"` (CPU), `"triton"` (CUDA and ROCm,
            not float64), `"torch"` or `"reference"` is used or raises an error if it cannot run.
            The environment variable `TTSR_FAST_BACKEND` does the same.

    Returns:
        `Match(score, index)` on the query grid. Equal scores go to the lowest key index. A NaN or
        an infinity anywhere in a query patch gives NaN there, and in an unmasked key patch NaN
        everywhere; so does a norm with a square that overflows (features of 1e17 or more in
        float32). On a GPU, where checking would synchronise, a mask without a True gives NaN too.

    Differentiable once, in query and key, through the two chosen patches and their norms, in
    reverse and in forward mode (`torch.func.jvp`, `torch.autograd.forward_ad`). The index is a
    constant of the derivative.

    Cost: `2 * C` FLOP per (query, key) pair instead of `2 * C * kernel_size**2` on the CPU; two,
    six or 18 times C on a GPU, where the algorithm depends on the size. Above inputs and outputs
    the CPU takes one copy of the inputs (with AMX of channels rounded up to a multiple of 32) and
    at most 16 MiB per thread, a GPU one copy (one and a half for `"bf16"` of float32 features) and
    at most 64 MiB. Nothing synchronises: a search can be captured in a CUDA graph. A long search on
    the CPU ends within a second of Ctrl-C, or of another signal with a handler that raises.

    Raises:
        TypeError: an argument is no tensor, or has another dtype than asked for.
        ValueError: shapes, devices or options that do not fit; a mask without a key.
        RuntimeError: the backend asked for cannot run here, or a second derivative is taken.

    Examples:
        >>> key = torch.rand(1, 64, 25, 31)
        >>> query = key[:, :, 4:14, 7:27]
        >>> match = search(query, key, padding=0)  # key grid: 23 x 29 patches
        >>> divmod(int(match.index[0, 0, 0]), 29)
        (4, 7)
    """
    query, key, precision = _check_pair(query, key, precision)
    patch = check_patch(kernel_size, padding)
    _check_choice("normalize", normalize, NORMALIZATIONS)
    if not isinstance(add_eps, bool):
        raise TypeError(f"add_eps must be True or False, got {add_eps!r}")
    least = torch.finfo(torch.promote_types(query.dtype, torch.float32)).tiny
    if not least <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least {least:.2g}, got {eps}")
    for name, x in (("query", query), ("key", key)):
        if min(patch.grid(*x.shape[2:])) < 1:
            raise ValueError(
                f"{name} {shape_of(x)} is smaller than one patch of {kernel_size}x{kernel_size} "
                f"with padding {patch.padding}"
            )
    if key_mask is not None:
        check_mask(key_mask, key, patch.grid(*key.shape[2:]))
    options = (*patch, *Score(normalize, float(eps), add_eps), precision, backend)
    return Match(*call_search(query, key, key_mask, *options))


def gather_fold(
    value: Tensor,  # [N or 1, C, HV, WV]
    index: Tensor,  # [N, H, W] int64
    *,
    stride: int = 1,
    kernel_size: int = 3,
    padding: int | None = None,
    weight: Tensor | None = None,  # [N, H, W]
    divisor: str = "area",
    backend: str | None = None,
) -> Tensor:  # [N, C, stride*H, stride*W]
    r"""Take the value patch at every index and overlap-add the patches on the query grid.

    The hard attention of TTSR (arXiv 2006.04139, equation 6) at one level of the feature pyramid.
    Value and output are cut into `stride x stride` blocks; with :math:`w = 1` unless `weight` is
    given,

    .. math::
        T[p] = \frac{1}{k^2} \sum_{d} w_{p-d} \; V[\text{index}_{p-d} + d]

    over the offsets d of a `kernel_size x kernel_size` patch for which p - d lies on the query
    grid. Blocks outside the value are zero. Patches are never formed: memory is linear in
    the output.

    Args:
        value: `[N, C, HV, WV]`, or batch 1 for all images; float64, float32, float16 or bfloat16.
            The key grid is `HV // stride x WV // stride`; the up to `stride - 1` rows and columns
            beyond it are read by the patches that reach them.
        index: `[N, H, W]`, int64, positions on the key grid as `search` returns them.
        stride: value pixels per key position at this level, 1 or more (TTSR: 1, 2, 4).
        kernel_size: side of a patch in key positions, odd, 1 to 7.
        padding: as given to `search`; default `kernel_size // 2`. The output grid is
            `H + kernel_size - 1 - 2 * padding` blocks high, and the key grid shrinks by as much.
        weight: `[N, H, W]`, a factor for every patch, any float dtype; differentiable.
        divisor: `"area"` divides by `kernel_size**2` everywhere, borders included, as TTSR does;
            `"overlap"` by the number of patches that meet at a block; `"none"` by nothing.
        backend: None chooses the fastest that can run; `"cpp"` (CPU and CUDA), `"torch"` or
            `"reference"` is used or raises an error if it cannot run. `"triton"`, which has only a
            search, is treated as None.

    Returns:
        `[N, C, stride*H, stride*W]`, dtype and memory format of `value`; accumulated in float32 for
        16-bit values. Bit-equal from run to run, and so are its gradients.

    Differentiable once, in value and weight, in reverse and in forward mode. Cost: `kernel_size**2`
    reads and one write per output.

    On CUDA a value without contiguous channels is copied to channels last first. Nothing
    synchronises: the kernel finds an index outside the key grid and stops with an assertion. Under
    `TTSR_FAST_CHECK_INDEX=0` such a patch adds nothing, and its gradient may be added to the
    gradient of another key.

    Raises:
        TypeError: an argument is no tensor, or has another dtype than asked for.
        ValueError: shapes, devices or options that do not fit; an index outside the key grid.
        RuntimeError: the backend asked for cannot run here, or a second derivative is taken.

    Examples:
        >>> value = torch.rand(1, 3, 100, 124)  # 4 x 4 pixels per position of a 25 x 31 key
        >>> index = torch.arange(25 * 31).view(1, 25, 31)  # every query matches its own position
        >>> texture = gather_fold(value, index, stride=4, divisor="overlap")
        >>> torch.allclose(texture, value)
        True
    """
    check_map("value", value)
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride must be a positive integer, got {stride!r}")
    patch = check_patch(kernel_size, padding)
    _check_choice("divisor", divisor, DIVISORS)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor, got {type_of(index)}")
    if index.dim() != 3:
        raise ValueError(f"index must be [N, H, W], got {shape_of(index)}")
    _check_device("index", index, "value", value)
    if value.shape[0] not in (1, index.shape[0]):
        raise ValueError(
            f"value must have batch size 1 or {index.shape[0]} (that of index), "
            f"got {shape_of(value)}"
        )
    if min(patch.grid(value.shape[2] // stride, value.shape[3] // stride)) < 1:
        raise ValueError(
            f"value {shape_of(value)} must hold at least one patch position at stride {stride}, "
            f"kernel_size {kernel_size} and padding {patch.padding}"
        )
    if 0 in index.shape[1:]:
        raise ValueError(f"index must have a non-empty grid, got {shape_of(index)}")
    if weight is not None:
        if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS:
            raise TypeError(f"weight must be a floating-point tensor, got {type_of(weight)}")
        if weight.shape != index.shape:
            raise ValueError(
                f"weight must have the shape {shape_of(index)} of index, got {shape_of(weight)}"
            )
        _check_device("weight", weight, "value", value)
    return call_gather_fold([value], index, weight, [stride], *patch, divisor, backend)[0]


def search_transfer(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    values: list[Tensor],  # [N or 1, C, stride*HK, stride*WK] each
    strides: list[int],
    *,
    names: Sequence[str],
    key_mask: Tensor | None = None,  # [N or 1, HK, WK] bool
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Match, list[Tensor]]:
    """`search`, and `gather_fold` of every value at its stride, with TTSR's options, in one.

    One `gather_fold` of all levels costs less to launch, and its gradient shares the inverse of the
    index.

    Args:
        query, key, key_mask, precision, backend: as for `search`.
        values, strides: the levels, as for `gather_fold`.
        names: of the values, for error messages.

    Returns:
        As `search`, and a list of what `gather_fold` returns.

    Raises:
        TypeError, ValueError, RuntimeError: as `search` and `gather_fold`.
    """
    query, key, precision = _check_pair(query, key, precision)
    for name, value, stride in zip(names, values, strides, strict=True):
        check_map(name, value)
        _check_batch(name, value, query)
        _check_device(name, value, "query", query)
        if [size // stride for size in value.shape[2:]] != list(key.shape[2:]):
            raise ValueError(
                f"{name} {shape_of(value)} must be {stride} times the size of key {shape_of(key)}, "
                f"up to {stride - 1} more rows and columns"
            )
    if key_mask is not None:
        check_mask(key_mask, key, (key.shape[2], key.shape[3]))
    score, index = call_search(query, key, key_mask, *Patch(), *Score(), precision, backend)
    return Match(score, index), call_gather_fold(
        values, index, None, strides, *Patch(), "area", backend
    )


def _check_pair(query: Tensor, key: Tensor, precision: str | None) -> tuple[Tensor, Tensor, str]:
    """Query and key in one dtype, and the precision of their search."""
    check_map("query", query)
    check_map("key", key)
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        if precision is None and query.dtype == torch.float32 == key.dtype:
            precision = _LOW_PRECISION.get(torch.get_autocast_dtype(device))
        widest = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(widest), key.to(widest)
    _check_same("key", key, "query", query)
    _check_batch("key", key, query)
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key must have the channels of query {shape_of(query)}, got {shape_of(key)}"
        )
    return query, key, _resolve_precision(precision, query.dtype)


def _resolve_precision(precision: str | None, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        if precision is not None:
            raise ValueError(
                f"precision must be None for float64 inputs, which are searched in float64, "
                f"got {precision!r}"
            )
        return "fp64"
    if precision is None:
        return _LOW_PRECISION.get(dtype, "fp32")
    _check_choice("precision", precision, PRECISIONS)
    return precision


def check_map(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be a float64, float32, float16 or bfloat16 tensor, got {type_of(x)}"
        )
    if x.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], got {shape_of(x)}")
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{name} must have at least one channel, row and column, got {shape_of(x)}"
        )


def _check_batch(name: str, x: Tensor, query: Tensor) -> None:
    if x.shape[0] not in (1, query.shape[0]):
        raise ValueError(
            f"{name} must have batch size 1 or {query.shape[0]} (that of query), got {shape_of(x)}"
        )


def _check_same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype {other.dtype} of {other_name}, got {x.dtype}")
    _check_device(name, x, other_name, other)


def _check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")


def check_patch(kernel_size: int, padding: int | None) -> Patch:
    """The patch of these two arguments of `search` and `gather_fold`, checked."""
    if not isinstance(kernel_size, int) or kernel_size not in KERNEL_SIZES:
        raise ValueError(f"kernel_size must be one of {KERNEL_SIZES}, got {kernel_size!r}")
    patch = Patch.of(kernel_size, padding)
    if not isinstance(patch.padding, int) or not 0 <= patch.padding <= kernel_size // 2:
        raise ValueError(
            f"padding must be an integer from 0 to {kernel_size // 2}, got {padding!r}"
        )
    return patch


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_mask(mask: Tensor, key: Tensor, grid: tuple[int, int]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be a bool tensor, got {type_of(mask)}")
    if mask.dim() != 3 or tuple(mask.shape[1:]) != grid or mask.shape[0] not in (1, key.shape[0]):
        raise ValueError(
            f"key_mask must be [{key.shape[0]} or 1, {grid[0]}, {grid[1]}] (the key grid), "
            f"got {shape_of(mask)}"
        )
    _check_device("key_mask", mask, "key", key)


def shape_of(x: Tensor) -> str:
    return str(list(x.shape))


def type_of(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
