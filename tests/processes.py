"""A group of processes that run what a test sends them, and the operations over them."""

import multiprocessing
import pickle
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checks import assert_same_choice
from ttsr_fast import search
from ttsr_fast.distributed import gather_fold_sharded, search_sharded, shard_rows
from ttsr_fast.operators import backends

LIMIT = 60.0  # seconds
PATCH = ("kernel_size", "padding")


class Ended:
    """The answer of a process that has ended instead."""


class Processes:
    """Each begins with a gloo group of all."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # which imports torch once
        context.set_forkserver_preload(["torch"])
        self.size = size
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, str(folder / "group"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns in each process, or the exception it raises."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        return [self._answer(pipe) for pipe in self._pipes]

    def _answer(self, pipe: Connection) -> Any:
        if not pipe.poll(LIMIT):
            pytest.fail(f"a process did not answer within {LIMIT:.0f} s")
        try:
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            return Ended()

    def end(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(5)
            process.kill()


def _serve(rank: int, size: int, path: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LIMIT),
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = error
        pipe.send_bytes(pickle.dumps(answer))


# --- what they run ---


def is_last():
    return dist.get_rank() == dist.get_world_size() - 1


def search_arguments(query, key, options):
    rows = shard_rows(key.shape[2], **{n: options[n] for n in PATCH if n in options})
    key_rows = key[:, :, rows.top : rows.bottom].clone()
    return {"query": query, "key_rows": key_rows, "height": key.shape[2], **options}


def search_rows(query, key, options=None, changes=None, last_changes=None):
    """A search whose arguments have changes, in all processes or the last one."""
    arguments = search_arguments(query, key, options or {}) | (changes or {})
    return search_sharded(**(arguments | (last_changes or {} if is_last() else {})))


def fold_rows(value, index, options=None, changes=None, last_changes=None):
    """The same for the transfer."""
    options = options or {}
    height, stride = value.shape[2], options.get("stride", 1)
    rows = shard_rows(height // stride, **{n: options[n] for n in PATCH if n in options})
    top, bottom = rows.of_value(height, stride)
    arguments = {"value_rows": value[:, :, top:bottom].clone(), "index": index}
    arguments |= {"value_height": height, **options, **(changes or {})}
    return gather_fold_sharded(**(arguments | (last_changes or {} if is_last() else {})))


# --- what they are held to ---


def pair(batch=1):
    """A query and a key, of which 2 and 3 processes hold as many rows as of one that is higher."""
    return torch.randn(2, 3, 6, 5), torch.randn(batch, 3, 7, 6)


def assert_same(processes, query, key, *, exact=None, **options):
    """Bit-equal to one process, unless products of PyTorch's library are rounded in between."""
    whole = search(query, key, **options)
    mask = options.pop("key_mask", None)
    if exact is None:
        exact = options.get("backend") != "torch" and backends.can_run("cpp", query.device)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    for found in processes.run(search_rows, query, key, options | {"key_mask": mask}):
        torch.testing.assert_close(found.score, whole.score, equal_nan=True, **tolerance)
        if exact or whole.score.isnan().any():
            assert torch.equal(found.index, whole.index)
        else:
            patch = {n: x for n, x in options.items() if n in (*PATCH, "normalize")}
            assert_same_choice(found, query, key, mask, **patch)
