"""Errors of calls that would reach outside of tensors; interruption of a long search."""

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.campaigns import fuzz_operators
from ttsr_fast import gather_fold, search
from ttsr_fast.functional import search_transfer
from ttsr_fast.kernels import search as kernel_search
from ttsr_fast.operators import cpp
from ttsr_fast.operators.patch import Patch, Score

ops = torch.ops.ttsr_fast
each = pytest.mark.parametrize
rand = torch.randn


def index_of(*size: int, value: int = 0) -> Tensor:
    return torch.full(size, value, dtype=torch.int64)


def searched(query: Tensor, key: Tensor, mask: Tensor | None = None, size: int = 3, pad: int = 1):
    return ops.search(query, key, mask, size, pad, "both", 1e-12, False, "fp32", "cpp")


def folded(value: Tensor, index: Tensor, weight: Tensor | None = None, stride: int = 1):
    return ops.gather_fold([value], index, weight, [stride], 3, 1, "area", "cpp")


def adjoint(index: Tensor, size: list[int], backend: str = "cpp"):
    options = ([1], 3, 1, "area", backend)
    return ops.gather_fold_adjoint([rand(1, 4, 8, 8)], index, None, size, *options)


def dot(value: Tensor, grad: Tensor, backend: str = "cpp"):
    return ops.gather_dot([value], [grad], index_of(1, 8, 8), [1], 3, 1, "area", backend)


X = (1, 4, 8, 8)
BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "channels": (lambda: searched(rand(1, 400, 8, 8), rand(1, 1, 8, 8)), "the channels of query"),
    "images": (lambda: searched(rand(64, 4, 8, 8), rand(2, 4, 8, 8)), "batch size 1 or 64"),
    "mask": (
        lambda: searched(rand(1, 4, 20, 20), rand(1, 4, 20, 20), torch.ones(1, 1, 1).bool()),
        r"key_mask must be \[1, 20, 20\], got \[1, 1, 1\]",
    ),
    "no images": (lambda: searched(rand(X), rand(0, 4, 8, 8)), "key must have at least 1"),
    "no channels": (lambda: searched(rand(1, 0, 8, 8), rand(1, 0, 8, 8)), "must have at least 1"),
    "kernel_size 0": (lambda: searched(rand(X), rand(X), None, 0, 0), "kernel_size must be 1, 3"),
    "kernel_size 2": (lambda: searched(rand(X), rand(X), None, 2, 0), "kernel_size must be 1, 3"),
    "types": (lambda: searched(rand(X), rand(X).half()), "key must be Float, got Half"),
    "small key": (lambda: searched(rand(X), rand(1, 4, 2, 9), None, 5, 0), "key is smaller"),
    "wide": (
        lambda: searched(rand(X), torch.zeros(1).expand(1, 4, 3, 2**40)),
        r"at most 2\^31 - 1 pixels",
    ),
    "deep": (
        lambda: search(*[torch.zeros(1).expand(1, 2**58, 1, 16)] * 2, kernel_size=1, backend="cpp"),
        r"2\^48 elements",
    ),
    "int32 index": (lambda: folded(rand(X), index_of(1, 8, 8).int()), "index must be Long"),
    "weight": (lambda: folded(rand(X), index_of(1, 80, 80), rand(1, 1, 1)), "weight must be"),
    "index images": (lambda: folded(rand(2, 4, 8, 8), index_of(9, 8, 8)), "batch size 1 or 9"),
    "high index": (lambda: adjoint(index_of(1, 8, 8, value=10**6), list(X)), r"in \[0, 64\)"),
    "low index": (lambda: adjoint(index_of(1, 8, 8, value=-1), list(X)), r"in \[0, 64\)"),
    "no value": (lambda: adjoint(index_of(1, 8, 8), [0, 4, 8, 8]), "must have at least 1"),
    "float64 value": (lambda: dot(rand(X).double(), rand(X)), "must be Double, got Float"),
    "grad channels": (lambda: dot(rand(1, 400, 8, 8), rand(1, 1, 8, 8)), r"\[1, 400, 8, 8\]"),
    "small score": (
        lambda: torch.ops.ttsr_fast.cpp_search(
            *(
                rand(1, 4, 80, 80),
                rand(1, 4, 80, 80),
                None,
                torch.empty(1, 1, 1),
                index_of(1, 1, 1),
            ),
            *(3, 1, True, True, 1e-12, False, False),
        ),
        r"score must be \[1, 80, 80\], got \[1, 1, 1\]",
    ),
    "all masked": (
        lambda: torch.ops.ttsr_fast.cpp_search(
            *(rand(X), rand(X), torch.zeros(1, 8, 8).bool(), torch.empty(1, 8, 8)),
            *(index_of(1, 8, 8), 3, 1, True, True, 1e-12, False, False),
        ),
        "at least one key position True",
    ),
    "small second": (
        lambda: torch.ops.ttsr_fast.cpp_search(
            *(rand(X), rand(X), None, torch.empty(1, 8, 8), index_of(1, 8, 8)),
            *(3, 1, True, True, 1e-12, False, False, torch.empty(1, 8, 7)),
        ),
        r"second must be \[1, 8, 8\], got \[1, 8, 7\]",
    ),
    "float certain": (
        lambda: torch.ops.ttsr_fast.cpp_search(
            *(rand(X), rand(X), None, torch.empty(1, 8, 8), index_of(1, 8, 8)),
            *(3, 1, True, True, 1e-12, False, False, None, torch.empty(1, 8, 8)),
        ),
        "certain must be Byte, got Float",
    ),
    "key grid": (
        lambda: torch.ops.ttsr_fast.cpp_gather_fold(
            *(rand(X), index_of(1, 8, 8), None, torch.empty(X), 1, 3, 1, 80, 80, "area"),
        ),
        "is not 80 x 80",
    ),
}


@pytest.mark.compiled
@each("name", BROKEN)
def test_compiled_operators_check_their_arguments(name):
    call, message = BROKEN[name]
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.compiled
@each("name", ["query", "key", "score", "index", "mask"])
def test_memory_that_is_no_longer_there(name):
    tensors = {
        "query": rand(1, 4, 30, 30),
        "key": rand(1, 4, 30, 30),
        "mask": torch.ones(1, 30, 30, dtype=torch.bool),
        "score": torch.empty(1, 30, 30),
        "index": index_of(1, 30, 30),
    }
    tensors[name].untyped_storage().resize_(100)
    with pytest.raises(RuntimeError, match="has less memory than its shape"):
        torch.ops.ttsr_fast.cpp_search(*tensors.values(), 3, 1, True, True, 1e-12, False, False)


def test_time_of_a_search_is_not_only_in_products(set_threads):
    """Every one of these searches takes seconds and must be interruptible."""
    set_threads(1)
    for query, key in (
        ((1, 1, 211, 211), (1, 1, 211, 211)),
        ((1, 1, 44000, 1), (1, 1, 44000, 1)),
        ((1, 64, 1, 1), (1, 64, 2000, 3000)),
        ((1, 64, 2000, 3000), (1, 64, 1, 1)),
    ):
        maps = (torch.empty(size, device="meta") for size in (query, key))
        assert cpp._seconds(*maps, 3) > cpp._LONG
    maps = (torch.empty(1, 256, 40, 40, device="meta") for _ in range(2))
    assert cpp._seconds(*maps, 3) < cpp._LONG


@each("wrong", [10**9, 64, -1, -1000])
@each("operation", ["value", "weight", "search", "transfer"])
def test_index_changed_behind_autograd(backend, operation, wrong):
    """Changes through `.data`, which autograd does not see. The backward pass checks again."""
    x, y = (rand(1, 4, 8, 8, requires_grad=True) for _ in range(2))
    if operation == "search":
        out, index = search(x, y, backend=backend)
    elif operation == "transfer":
        match, (texture,) = search_transfer(x, y, [y], [1], names=["value"], backend=backend)
        out, index = match.score.sum() + texture.sum(), match.index
    else:
        weight = torch.ones(1, 8, 8, requires_grad=operation == "weight")
        value, index = x if operation == "value" else x.detach(), index_of(1, 8, 8)
        out = gather_fold(value, index, weight=weight, backend=backend)
    index.data[:] = wrong
    with pytest.raises((RuntimeError, ValueError), match="index"):
        out.sum().backward()


def test_search_backward_checks_shapes(backend):
    arguments = [rand(1, 8, 8), rand(X), rand(X), rand(1, 8, 8), index_of(1, 8, 8)]
    for place, other in ((0, rand(1, 1, 1)), (1, rand(1, 4, 9, 8)), (2, rand(1, 3, 8, 8))):
        broken = [*arguments[:place], other, *arguments[place + 1 :]]
        with pytest.raises(ValueError, match="do not fit"):
            ops.search_backward(*broken, 3, 1, "both", 1e-12, False, backend, [True, True])


def test_random_calls():
    """A short run of the campaign."""
    ends = fuzz_operators.run(calls=60, broken=250, seed=torch.initial_seed() % 2**31)
    assert ends["right"] == 60
    assert sum(ends.values()) == 310
    assert ends["accepted"] < 125


@pytest.fixture
def handle() -> Iterator[Callable[..., None]]:
    """Sets a handler of SIGUSR1 for one test."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handler: signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGUSR1, before)


def send_soon() -> None:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()


def test_interrupted_function_ends_before_the_exception_of_the_handler_is_raised(handle):
    """With any number of signals."""

    class Interrupt(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    def wait_for_stop(argument: int, stop: Tensor) -> None:
        deadline = time.monotonic() + 20
        for _ in range(4):
            send_soon()
        while stop[0] == 0:
            assert time.monotonic() < deadline
        time.sleep(0.1)  # for the other signals
        ended.append(argument)
        raise RuntimeError("interrupted")

    ended: list[int] = []
    handle(interrupt)
    with pytest.raises(Interrupt):
        cpp.interruptible(wait_for_stop, 42)
    assert ended == [42]


def test_function_continues_after_a_handler_that_returns(handle):
    def wait_for_handler(stop: Tensor) -> None:
        deadline = time.monotonic() + 20
        send_soon()
        while not seen:
            assert time.monotonic() < deadline
        assert stop[0] == 0
        ended.append(True)

    seen: list[bool] = []
    ended: list[bool] = []
    handle(lambda *_: seen.append(True))
    cpp.interruptible(wait_for_handler)
    assert (seen, ended) == ([True], [True])


@pytest.mark.compiled
def test_long_search_is_like_a_short_one_and_can_be_stopped(monkeypatch):
    query, key = rand(1, 8, 40, 40), rand(1, 8, 40, 40)
    expected = search(query, key, backend="cpp")
    threads: list[int] = []
    start = _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", lambda *a: threads.append(0) or start(*a))
    monkeypatch.setattr(cpp, "_LONG", 0)
    match = search(query, key, backend="cpp")
    with ThreadPoolExecutor(1) as other:  # no handler runs there
        other.submit(search, query, key, backend="cpp").result()
    assert threads == [0]
    assert torch.equal(match.score, expected.score)
    assert torch.equal(match.index, expected.index)
    with pytest.raises(RuntimeError, match="interrupted"):
        torch.ops.ttsr_fast.cpp_search(
            *(query, key, None, *match, 3, 1, True, True, 1e-12, False, False),
            stop=torch.ones(1, dtype=torch.int32),
        )


@pytest.mark.compiled
def test_errors_of_a_long_search_arrive(monkeypatch):
    monkeypatch.setattr(cpp, "_LONG", 0)
    with pytest.raises(RuntimeError, match="batch size 1 or 3"):
        searched(rand(3, 4, 8, 8), rand(2, 4, 8, 8))


@each(
    "broken",
    [
        {"key": torch.zeros(1, 1, 8, 8)},
        {"key": torch.zeros(2, 4, 8, 8)},
        {"key": torch.zeros(1, 4, 8, 8).half()},
        {"key_mask": torch.ones(1, 1, 1).bool()},
        {"match": (torch.empty(1, 8, 8), torch.zeros(1, 1, 1).long())},
        {"match": (torch.zeros(1, 8, 9)[..., :8], torch.zeros(1, 8, 8).long())},
        {"patch": Patch(2, 1)},
        {"patch": Patch(3, 2)},
        {"query": torch.zeros(1, 4, 8, 8, device="meta")},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_triton_kernels_check_their_arguments(broken):
    right = {
        "query": torch.zeros(1, 4, 8, 8),
        "key": torch.zeros(1, 4, 8, 8),
        "key_mask": None,
        "match": (torch.empty(1, 8, 8), torch.empty(1, 8, 8, dtype=torch.int64)),
        "patch": Patch(3, 1),
    }
    options = {"scoring": Score("both", 1e-12, False), "plan": kernel_search.Plan("fp32")}
    with pytest.raises(ValueError, match="do not fit each other"):
        kernel_search.stages(**(right | broken), **options)
