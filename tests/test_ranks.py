"""Processes that fail, disagree, stay silent or end: an error in all the others, never a wait."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.processes import (
    Ended,
    assert_same,
    fold_rows,
    is_last,
    pair,
    search_arguments,
    search_rows,
)
from ttsr_fast.distributed import search_sharded, shard_rows, sharded

pytestmark = pytest.mark.xdist_group("processes")  # which are started once
each = pytest.mark.parametrize
SHORT = 0.5  # seconds
MASK = torch.ones(1, 7, 6, dtype=torch.bool)
INDEX = torch.zeros(2, 6, 5, dtype=torch.int64)


def search_or_fold(query, key):
    return fold_rows(key, INDEX) if is_last() else search_rows(query, key)


def search_with(search_band, query, key):
    """A search that goes wrong in the last process, once all have agreed on it."""
    before = sharded.search_band
    if is_last():
        sharded.search_band = search_band
    try:
        return search_rows(query, key)
    finally:
        sharded.search_band = before


def run_out_of_memory(*arguments, **options):
    raise MemoryError("there is none left")


def end_at_once(*arguments, **options):
    os._exit(1)


def search_in_a_large_key(columns):
    height = 1 << 20
    rows = shard_rows(height)
    key_rows = torch.zeros(1).expand(1, 1, rows.bottom - rows.top, columns)
    return search_sharded(torch.zeros(1, 1, 3, 3), key_rows, height)


def search_without_the_last(query, key):
    """How long it takes to fail, and how; the group, which is lost, ends with it."""
    arguments = search_arguments(query, key, {"group": dist.new_group(), "timeout": SHORT})
    if is_last():
        return time.sleep(2 * SHORT)
    start = time.monotonic()
    try:
        return search_sharded(**arguments)
    except RuntimeError as error:
        dist.destroy_process_group(arguments["group"])
        return time.monotonic() - start, str(error)


def assert_errors(processes, answers, kind, text, last_kind=None, last_text=None):
    """These in each process; and the group is as good as before."""
    kinds = [kind] * (processes.size - 1) + [last_kind or kind]
    texts = [text] * (processes.size - 1) + [last_text or text]
    for answer, expected, part in zip(answers, kinds, texts, strict=True):
        assert type(answer) is expected, answer
        assert part in str(answer)
    assert_same(processes, *pair())


@each(
    ("change", "name"),
    [
        (lambda query, key: {"height": 8}, "height"),
        (lambda query, key: {"query": query + 1}, "query"),
        (lambda query, key: {"query": query.flip(3)}, "query"),
        (lambda query, key: {"query": query[:, :, :5]}, "query"),
        (lambda query, key: {"query": query.flip(0)}, "query"),
        (lambda query, key: {"key_mask": torch.ones(1, 7, 6, dtype=torch.bool)}, "key_mask"),
        (lambda query, key: {"normalize": "key"}, "options"),
        (lambda query, key: {"backend": "torch"}, "options"),
    ],
)
def test_processes_that_disagree(processes, change, name):
    query, key = pair()
    answers = processes.run(search_rows, query, key, {}, {}, change(query, key))
    assert_errors(processes, answers, ValueError, f"must agree on {name}, which is")


@each("change", [lambda x: x.double(), lambda x: x[..., :5], lambda x: x[:, :2]])
def test_two_that_disagree_on_the_key(two, change):
    query, key = pair(2)
    rows = two.run(shard_rows, 7)[-1]
    last = {"key_rows": change(key[:, :, rows.top : rows.bottom])}
    answers = two.run(search_rows, query, key, {}, {}, last)
    assert_errors(two, answers, ValueError, "must agree on key_rows")


def test_processes_that_call_another_function(processes):
    answers = processes.run(search_or_fold, *pair())
    text = "must agree on the operation, which is "
    assert_errors(
        processes,
        answers,
        ValueError,
        text + "search_sharded",
        last_text=text + "gather_fold_sharded",
    )


@each(
    ("change", "kind", "text"),
    [
        ({"query": None}, TypeError, "query must be a float64, float32"),
        ({"key_rows": torch.randn(1, 3, 2, 6)}, ValueError, "key_rows must hold the rows"),
        ({"height": 0}, ValueError, "height must be an integer"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be one of"),
        ({"timeout": 0}, ValueError, "timeout must be a number of seconds"),
        ({"query": torch.randn(1, 3, 6, 5).requires_grad_()}, RuntimeError, "query requires a"),
    ],
)
def test_an_error_in_one_process(processes, change, kind, text):
    answers = processes.run(search_rows, *pair(), {}, {}, change)
    other = f"search_sharded: process {processes.size - 1} of the group raised an error"
    assert_errors(processes, answers, RuntimeError, other, kind, text)


def test_an_error_in_one_process_during_its_search(processes):
    answers = processes.run(search_with, run_out_of_memory, *pair())
    other = f"search_sharded: process {processes.size - 1} of the group raised an error"
    assert_errors(processes, answers, RuntimeError, other, MemoryError, "there is none left")


@each(
    ("change", "kind", "text"),
    [
        ({"query": torch.randn(3, 6, 5)}, ValueError, "query must be [N, C, H, W]"),
        ({"query": torch.randn(1, 4, 6, 5)}, ValueError, "key must have the channels of query"),
        ({"key_rows": [1.0]}, TypeError, "key_rows must be a float64"),
        ({"height": "7"}, ValueError, "height must be an integer"),
        ({"padding": 2}, ValueError, "padding must be an integer from 0 to 1, got 2"),
        ({"normalize": "all"}, ValueError, "normalize must be one of"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of"),
        ({"patch_size": 3}, TypeError, "unexpected keyword argument 'patch_size'"),
        ({"key_mask": MASK[:, 1:]}, ValueError, "key_mask must be [1 or 1, 7, 6] (the key grid)"),
        ({"key_mask": MASK.float()}, TypeError, "key_mask must be a bool tensor"),
        ({"key_mask": ~MASK}, ValueError, "key_mask must leave at least one key position True"),
        ({"timeout": "soon"}, ValueError, "timeout must be a number of seconds above 0"),
    ],
)
def test_bad_arguments(two, change, kind, text):
    answers = two.run(search_rows, *pair(), {}, change)
    assert_errors(two, answers, kind, text)


def test_a_key_beyond_the_index(two):
    answers = two.run(search_in_a_large_key, 1 << 12)
    assert_errors(two, answers, ValueError, "must have fewer than 2**32")


@each(
    ("change", "kind", "text"),
    [
        ({"index": INDEX - 1}, ValueError, "index must lie in [0, 42) for the 7 x 6 key grid"),
        ({"index": INDEX + 42}, ValueError, "index must lie in [0, 42) for the 7 x 6 key grid"),
        ({"index": INDEX.int()}, TypeError, "index must be an int64 tensor, got torch.int32"),
        ({"index": INDEX[0]}, ValueError, "index must be [N, H, W]"),
        ({"stride": 0}, ValueError, "stride must be a positive integer, got 0"),
        ({"value_height": 7.0}, ValueError, "value_height must be a positive integer, got 7.0"),
        ({"value_rows": torch.zeros(7, 6)}, ValueError, "value_rows must be [N, C, H, W]"),
        ({"weight": 0.5}, TypeError, "weight must be a floating-point tensor, got float"),
        ({"weight": torch.ones(1, 6, 5)}, ValueError, "weight must have the shape"),
        ({"divisor": "sum"}, ValueError, "divisor must be one of"),
        ({"kernel_size": 2}, ValueError, "kernel_size must be one of"),
    ],
)
def test_bad_arguments_of_the_transfer(two, change, kind, text):
    answers = two.run(fold_rows, torch.randn(1, 3, 7, 6), INDEX, {}, change)
    assert_errors(two, answers, kind, text)


@each(
    ("change", "name"),
    [
        ({"index": INDEX + 1}, "index"),
        ({"weight": torch.ones(2, 6, 5)}, "weight"),
        ({"divisor": "none"}, "options"),
    ],
)
def test_two_that_disagree_on_the_transfer(two, change, name):
    answers = two.run(fold_rows, torch.randn(1, 3, 7, 6), INDEX, {}, {}, change)
    assert_errors(two, answers, ValueError, f"must agree on {name}, which is")


def test_a_value_without_its_last_row(processes):
    value = torch.randn(1, 3, 15, 12)
    short = {"value_rows": value[:, :, :2]}
    answers = processes.run(fold_rows, value, INDEX, {"stride": 2}, {}, short)
    other = f"gather_fold_sharded: process {processes.size - 1} of the group raised an error"
    assert_errors(processes, answers, RuntimeError, other, ValueError, "value_rows must hold the")


def test_a_value_narrower_than_a_patch(two):
    options = {"kernel_size": 7, "padding": 0}
    answers = two.run(fold_rows, torch.randn(1, 3, 9, 6), INDEX, options)
    assert_errors(two, answers, ValueError, "value_rows must be as wide as one patch at stride 1")


def test_a_gradient_is_refused(two):
    value = {"value_rows": torch.randn(1, 3, 7, 6).requires_grad_()}
    answers = two.run(fold_rows, torch.randn(1, 3, 7, 6), INDEX, {}, value)
    assert_errors(two, answers, RuntimeError, "value_rows requires a gradient")


def test_without_a_group():
    query, key = pair()
    for function in (lambda: shard_rows(7), lambda: search_sharded(query, key, 7)):
        with pytest.raises(RuntimeError, match="torchrun --nproc-per-node 2 program.py"):
            function()


@pytest.mark.torch(2, 8)  # before, gloo itself waits on after the time that it was given
def test_a_process_that_does_not_answer(processes):
    before = time.monotonic()
    *answers, _ = processes.run(search_without_the_last, *pair())
    assert time.monotonic() - before < 15  # nothing of it is waited for any longer
    for seconds, text in answers:
        assert "did not answer" in text
        assert SHORT / 2 < seconds < 4 * SHORT
    assert_same(processes, *pair())


def test_a_process_that_dies(start_processes):
    before = time.monotonic()
    error, ended = start_processes(2).run(search_with, end_at_once, *pair())
    assert isinstance(ended, Ended)
    assert type(error) is RuntimeError and "a process of the group has ended" in str(error)
    assert time.monotonic() - before < 15  # and not the 30 s for one that is silent
