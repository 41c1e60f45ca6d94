"""What the compiled libraries are called with: layouts, whole blocks, weights.

The library for the CPU takes rows or channels that lie side by side, as the result has them; that
for CUDA reads channels side by side and writes either.
"""

import _thread
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast.operators import pytorch, schemas  # noqa: F401  # schemas defines the operators
from ttsr_fast.operators.choosers import Choosers, checks_index

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
    query, key, key_mask, score, index, kernel_size, padding, normalize, eps, add_eps, precision
):
    normalized = (normalize == "both", normalize != "none")
    options = (kernel_size, padding, *normalized, eps, add_eps, precision == "bf16")
    arguments = (query, key, key_mask, score, index, *options)
    if _seconds(query, key, kernel_size) > _LONG:
        interruptible(torch.ops.ttsr_fast.cpp_search, *arguments)
    else:
        torch.ops.ttsr_fast.cpp_search(*arguments)
    if precision == "bf16" and query.dtype != torch.bfloat16:
        _rescore(query, key, score, index, kernel_size, padding, normalize, eps, add_eps)


def _seconds(query: Tensor, key: Tensor, kernel_size: int) -> float:
    """Rough time of a search with AVX-512: pairs in vectors of keys, and copies of the maps."""
    images, channels, height, width = query.shape
    key_images, _, key_height, key_width = key.shape
    pairs = images * height * width * key_height * -(-key_width // 16) * 16
    pixels = images * height * width + key_images * key_height * key_width
    nanoseconds = pairs * (channels / 60 + 0.35 * kernel_size + 0.7) + 7 * pixels * channels
    wide = 2 if query.dtype == torch.float64 else 1
    return 1e-9 * wide * nanoseconds / torch.get_num_threads()


def _rescore(query, key, score, index, kernel_size, padding, normalize, eps, add_eps):
    """The score of the chosen pairs from the features as given, not as rounded for the choice."""
    patch = (kernel_size, padding)
    exact = torch.empty_like(score)
    gather_dot(key, query, index, exact, 1, *patch, "none")
    if normalize in ("both", "key"):
        chosen = torch.empty_like(score.unsqueeze(1))
        norm = pytorch.denominator(pytorch.patch_norm(key, *patch), eps, add_eps)
        gather_fold([norm], index, None, [chosen], [1], 1, 0, "none")
        exact /= chosen[:, 0]
    if normalize == "both":
        exact /= pytorch.denominator(pytorch.patch_norm(query, *patch)[:, 0], eps, add_eps)
    score.copy_(torch.where(score.isnan(), score, exact))


def gather_fold(values, index, weight, outs, strides, kernel_size, padding, divisor):
    if index.is_cuda:
        return cuda_gather_fold(values, index, weight, outs, strides, kernel_size, padding, divisor)
    for value, out, stride in zip(values, outs, strides, strict=True):
        torch.ops.ttsr_fast.cpp_gather_fold(
            _laid_out_like(out, _whole_blocks(value, stride)),
            index.contiguous(),
            weight,
            out,
            stride,
            kernel_size,
            padding,
            *_key_grid(value, stride, kernel_size, padding),
            divisor,
        )


def gather_fold_adjoint(grads, choosers, weight, outs, strides, kernel_size, padding, divisor):
    run = cuda_gather_fold_adjoint if choosers.index.is_cuda else _cpu_adjoint
    padded = [_with_whole_blocks(out, stride) for out, stride in zip(outs, strides, strict=True)]
    keys = _key_grid(outs[0], strides[0], kernel_size, padding)
    run(grads, choosers, weight, padded, strides, kernel_size, padding, keys, divisor)
    for out, whole in zip(outs, padded, strict=True):
        if whole is not out:
            out.copy_(whole[:, :, : out.shape[2], : out.shape[3]])


def _cpu_adjoint(grads, choosers, weight, outs, strides, kernel_size, padding, keys, divisor):
    for grad, out, stride in zip(grads, outs, strides, strict=True):
        torch.ops.ttsr_fast.cpp_gather_fold_adjoint(
            _laid_out_like(out, grad),
            choosers.index.contiguous(),
            weight,
            out,
            stride,
            kernel_size,
            padding,
            *keys,
            divisor,
        )


def gather_dot(value, grad, index, out, stride, kernel_size, padding, divisor):
    whole, keys = _whole_blocks(value, stride), _key_grid(value, stride, kernel_size, padding)
    options = (stride, kernel_size, padding, *keys, divisor)
    if index.is_cuda:
        return cuda_gather_dot(whole, grad, index, out, *options)
    torch.ops.ttsr_fast.cpp_gather_dot(whole, grad, index.contiguous(), out, *options)


# --- CUDA ---


def cuda_gather_fold(values, index, weight, outs, strides, kernel_size, padding, divisor):
    whole = [_whole_blocks(value, stride) for value, stride in zip(values, strides, strict=True)]
    torch.ops.ttsr_fast.cuda_gather_fold(
        [_channels_last(value) for value in whole],
        index.contiguous(),
        _sum_weight(weight, values[0]),
        outs,
        strides,
        kernel_size,
        padding,
        *_key_grid(values[0], strides[0], kernel_size, padding),
        divisor,
        checks_index(),
    )


def cuda_gather_fold_adjoint(
    grads: list[Tensor],
    choosers: Choosers,
    weight: Tensor | None,
    outs: list[Tensor],
    strides: list[int],
    kernel_size: int,
    padding: int,
    keys: list[int],
    divisor: str,
) -> None:
    for batch in {len(out) for out in outs}:  # one value for all images, or one for each
        levels = [level for level, out in enumerate(outs) if len(out) == batch]
        csr_offsets, csr_indices = choosers.of(keys[0] * keys[1], batch)
        torch.ops.ttsr_fast.cuda_gather_fold_adjoint(
            [_channels_last(grads[level]) for level in levels],
            choosers.index.contiguous(),
            csr_offsets,
            csr_indices,
            _sum_weight(weight, grads[0]),
            [outs[level] for level in levels],
            [strides[level] for level in levels],
            kernel_size,
            padding,
            *keys,
            divisor,
        )


def cuda_gather_dot(value, grad, index, out, *options):
    torch.ops.ttsr_fast.cuda_gather_dot(
        _channels_last(value),
        _channels_last(grad),
        index.contiguous(),
        out,
        *options,
        checks_index(),
    )


def _sum_weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(pytorch.work_dtype(x.dtype)).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    """`x` with the channels of a pixel side by side; pixels and images may lie anywhere."""
    beside = x.stride(1) == 1 or x.shape[1] == 1
    return x if beside else x.contiguous(memory_format=torch.channels_last)


# --- layouts ---


def _key_grid(value: Tensor, stride: int, kernel_size: int, padding: int) -> list[int]:
    return [size // stride + 2 * padding - kernel_size + 1 for size in value.shape[2:]]


def _whole_blocks(x: Tensor, stride: int) -> Tensor:
    """`x`, or a zero-padded copy if its last blocks are not whole."""
    missing = [-size % stride for size in x.shape[2:]]
    return F.pad(x, [0, missing[1], 0, missing[0]]) if any(missing) else x


def _with_whole_blocks(out: Tensor, stride: int) -> Tensor:
    """`out`, or one to fill in its stead if its last blocks are not whole."""
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
