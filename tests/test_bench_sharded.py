"""The benchmark of a search over processes: what it refuses, and what it measures."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ttsr_fast import search

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

import sharded
from sizes import Size

pytestmark = pytest.mark.xdist_group("processes")  # which are started once


def measure(wrong):
    """What `bench/sharded.py` measures, of a search that may go wrong."""
    arguments = {"processes": dist.get_world_size(), "threads": 1, "channels": 4, "seconds": 0.01}
    before = sharded.search_sharded
    if wrong:
        sharded.search_sharded = lambda *args, **options: search(torch.ones(1, 4, 9, 8), args[1])
    try:
        return sharded.measure(Size.parse("9x8:7x6"), Namespace(**arguments))
    finally:
        sharded.search_sharded = before
        torch.set_num_threads(1)


@pytest.mark.compiled
def test_bench_measures_one_process_and_several(two):
    records, follower = two.run(measure, False)
    assert follower is None
    labels = ["1 process, 1 thread", "1 process, 2 threads", "2 processes, 1 thread each"]
    assert [record["label"] for record in records] == labels
    assert [record["status"] for record in records] == ["ok"] * 3
    assert [record["key_bytes"] for record in records] == [4 * 4 * 7 * 6] * 2 + [4 * 4 * 5 * 6]
    assert all(record["median_s"] > 0 and record["peak_bytes"] >= 0 for record in records)
    table = sharded.table(Size.parse("9x8:7x6"), 4, records)
    assert [row[0] for row in table.rows] == labels


@pytest.mark.compiled
def test_bench_times_nothing_that_is_wrong(two):
    records, _ = two.run(measure, True)
    assert [record["status"] for record in records] == ["ok", "ok", "failed"]
    assert records[2]["reason"] == "the result is not that of one process, bit for bit"
    assert "median_s" not in records[2]


def test_bench_needs_torchrun(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        sharded.parse([])
    assert "torchrun --nproc-per-node 2 bench/sharded.py" in capsys.readouterr().err
