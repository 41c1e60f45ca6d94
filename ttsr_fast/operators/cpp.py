"""Backend `"cpp"`: calls of the compiled libraries, with the layouts that they take.

The library for the CPU takes maps with contiguous rows, or with contiguous channels, as the result
has them; the CUDA library reads contiguous channels and writes either.
"""

import _thread
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast.operators import library
from ttsr_fast.operators.index import InverseIndex, checks_index
from ttsr_fast.operators.patch import Patch, Score, Transfer, sum_dtype

# Seconds from which on a search is interruptible. The threads of the main thread wait actively for
# a few milliseconds after their last work, beside those that the search then has of its own.
_LONG = 0.3


def interruptible(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function without holding up signal handlers, such as the one of Ctrl-C.

    Python handles signals in its main thread, between bytecodes. The function therefore runs in
    another thread, and the main thread waits. An exception out of a handler stops the function and
    is raised when it has ended.

    Args:
        function: it releases the lock of the interpreter, and takes after `arguments` an int32
            tensor [1] that is set to 1 to end it.
        arguments: of the function.

    Raises: what the function or a signal handler raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments, None)
    stop = torch.zeros(1, dtype=torch.int32)
    begun, ended = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        begun.set()
        try:
            function(*arguments, stop)
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    try:
        # A call without waiting inside, in which a handler of signals could raise.
        _thread.start_new_thread(run, ())
        ended.wait()
    except BaseException:
        finished = False
        while not finished:
            with suppress(BaseException):  # from more signals of the same kind
                stop.fill_(1)
                finished = ended.wait() if begun.wait(1) else True
        raise
    if errors:
        raise errors[0]


def search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    match: tuple[Tensor, Tensor],  # [N, Ho, Wo] twice, filled
    patch: Patch,
    scoring: Score,
    precision: str,
) -> None:
    _search(query, key, key_mask, match, patch, scoring, precision, None)


def score_excluding(
    index: Tensor,  # [N, Ho, Wo]
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    score: Tensor,  # [N, Ho, Wo], filled
    patch: Patch,
    scoring: Score,
    precision: str,
) -> None:
    second, found = torch.empty_like(score), torch.empty_like(index)
    _search(query, key, key_mask, (score, found), patch, scoring, precision, second)
    score.copy_(torch.where(found == index, second, score))


def _search(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    match: tuple[Tensor, Tensor],
    patch: Patch,
    scoring: Score,
    precision: str,
    second: Tensor | None,  # [N, Ho, Wo], filled with the best score of another key
) -> None:
    normalize = (scoring.of_query, scoring.of_key, scoring.eps, scoring.add_eps)
    options = (*patch, *normalize, precision == "bf16")
    arguments = (query, key, key_mask, *match, *options, second, None)
    if _seconds(query, key, patch.kernel_size) > _LONG:
        interruptible(torch.ops.ttsr_fast.cpp_search, *arguments)
    else:
        torch.ops.ttsr_fast.cpp_search(*arguments)


def _seconds(query: Tensor, key: Tensor, kernel_size: int) -> float:
    """Rough time of a search with AVX-512: pairs in vectors of keys, and copies of the maps."""
    images, channels, height, width = query.shape
    key_images, _, key_height, key_width = key.shape
    pairs = images * height * width * key_height * -(-key_width // 16) * 16
    pixels = images * height * width + key_images * key_height * key_width
    nanoseconds = pairs * (channels / 60 + 0.35 * kernel_size + 0.7) + 7 * pixels * channels
    wide = 2 if query.dtype == torch.float64 else 1
    return 1e-9 * wide * nanoseconds / torch.get_num_threads()


def gather_fold(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    index: Tensor,  # [N, Ho, Wo]
    weight: Tensor | None,  # [N, Ho, Wo]
    outs: list[Tensor],  # [N, C, stride*H, stride*W] each, filled
    transfer: Transfer,
) -> None:
    if index.is_cuda:
        return cuda_gather_fold(values, index, weight, outs, transfer)
    index = index.contiguous()
    for level, (value, out) in enumerate(zip(values, outs, strict=True)):
        stride = transfer.strides[level]
        value_ = _laid_out_like(out, _whole_blocks(value, stride))
        options = (stride, *transfer.patch, *transfer.key_grid(value.shape, level))
        torch.ops.ttsr_fast.cpp_gather_fold(value_, index, weight, out, *options, transfer.divisor)


def gather_fold_adjoint(
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    inverse: InverseIndex,
    weight: Tensor | None,  # [N, Ho, Wo]
    outs: list[Tensor],  # [N or 1, C, HV, WV] each, filled
    transfer: Transfer,
) -> None:
    run = cuda_gather_fold_adjoint if inverse.index.is_cuda else _cpu_adjoint
    whole = [_with_whole_blocks(x, n) for x, n in zip(outs, transfer.strides, strict=True)]
    run(grads, inverse, weight, whole, transfer, transfer.key_grid(outs[0].shape))
    for out, filled in zip(outs, whole, strict=True):
        if filled is not out:
            out.copy_(filled[:, :, : out.shape[2], : out.shape[3]])


def _cpu_adjoint(
    grads: list[Tensor],
    inverse: InverseIndex,
    weight: Tensor | None,
    outs: list[Tensor],
    transfer: Transfer,
    keys: tuple[int, int],
) -> None:
    index = inverse.index.contiguous()
    for grad, out, stride in zip(grads, outs, transfer.strides, strict=True):
        options = (stride, *transfer.patch, *keys, transfer.divisor)
        grad = _laid_out_like(out, grad)
        torch.ops.ttsr_fast.cpp_gather_fold_adjoint(grad, index, weight, out, *options)


def gather_dot(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    index: Tensor,  # [N, Ho, Wo]
    out: Tensor,  # [N, Ho, Wo], filled
    transfer: Transfer,
) -> None:
    run = cuda_gather_dot if index.is_cuda else torch.ops.ttsr_fast.cpp_gather_dot
    index = index.contiguous()
    for level, (value, grad) in enumerate(zip(values, grads, strict=True)):
        stride, part = transfer.strides[level], torch.empty_like(out) if level else out
        options = (stride, *transfer.patch, *transfer.key_grid(value.shape, level))
        run(_whole_blocks(value, stride), grad, index, part, *options, transfer.divisor)
        if level:
            out += part


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this backend cannot run, or None."""
    if device.type == "cpu":
        return library.load_library()
    if device.type != "cuda":
        return "the compiled kernels are for the CPU and for CUDA"
    if op in ("search", "score_excluding"):
        return "the compiled search is for the CPU; backend='triton' searches on a GPU"
    return library.load_cuda_library() or library.why_not_gpu(device)


# --- CUDA ---


def cuda_gather_fold(
    values: list[Tensor],
    index: Tensor,
    weight: Tensor | None,
    outs: list[Tensor],
    transfer: Transfer,
) -> None:
    whole = [_whole_blocks(x, n) for x, n in zip(values, transfer.strides, strict=True)]
    torch.ops.ttsr_fast.cuda_gather_fold(
        [_channels_last(value) for value in whole],
        index.contiguous(),
        _sum_weight(weight, values[0]),
        outs,
        transfer.strides,
        *transfer.patch,
        *transfer.key_grid(values[0].shape),
        transfer.divisor,
        checks_index(),
    )


def cuda_gather_fold_adjoint(
    grads: list[Tensor],
    inverse: InverseIndex,
    weight: Tensor | None,
    outs: list[Tensor],
    transfer: Transfer,
    keys: tuple[int, int],
) -> None:
    for batch in {len(out) for out in outs}:  # one value for all images, or one for each
        levels = [level for level, out in enumerate(outs) if len(out) == batch]
        torch.ops.ttsr_fast.cuda_gather_fold_adjoint(
            [_channels_last(grads[level]) for level in levels],
            inverse.index.contiguous(),
            *inverse.csr(keys[0] * keys[1], batch),
            _sum_weight(weight, grads[0]),
            [outs[level] for level in levels],
            [transfer.strides[level] for level in levels],
            *transfer.patch,
            *keys,
            transfer.divisor,
        )


def cuda_gather_dot(value: Tensor, grad: Tensor, *rest: Any) -> None:
    maps = (_channels_last(value), _channels_last(grad))
    torch.ops.ttsr_fast.cuda_gather_dot(*maps, *rest, checks_index())


def _sum_weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(sum_dtype(x.dtype)).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    """`x` with the channels of a pixel contiguous; pixels and images may lie anywhere."""
    contiguous = x.stride(1) == 1 or x.shape[1] == 1
    return x if contiguous else x.contiguous(memory_format=torch.channels_last)


# --- layouts ---


def _whole_blocks(x: Tensor, stride: int) -> Tensor:
    """`x`, or a zero-padded copy if its last blocks are not whole."""
    missing = [-size % stride for size in x.shape[2:]]
    return F.pad(x, [0, missing[1], 0, missing[0]]) if any(missing) else x


def _with_whole_blocks(out: Tensor, stride: int) -> Tensor:
    """`out`, or a larger map to fill instead if its last blocks are not whole."""
    size = [-(-n // stride) * stride for n in out.shape[2:]]
    if size == list(out.shape[2:]):
        return out
    layout = torch.contiguous_format if out.is_contiguous() else torch.channels_last
    return torch.empty(
        [*out.shape[:2], *size], dtype=out.dtype, device=out.device, memory_format=layout
    )


def _laid_out_like(out: Tensor, x: Tensor) -> Tensor:
    """`x` in the memory format of `out`; rows, images and channels may lie anywhere.

    To be called last: padding may change the layout.
    """
    if out.is_contiguous():
        return x if x.stride(3) == 1 else x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)
