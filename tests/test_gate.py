"""The gate of the benchmarks: results held against ground truth in float64."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ttsr_fast import reference

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

from gate import SearchTruth, WrongResult, check_close
from registry import Candidate, Size
from search_candidates import CANDIDATES
from search_candidates import maps as make_maps

QUERY, KEY = (7, 9), (6, 8)
each = pytest.mark.parametrize
Found = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def maps() -> Found:
    return make_maps(Size(QUERY, KEY, channels=8))


@pytest.fixture(scope="module")
def truth(maps: Found) -> SearchTruth:
    return SearchTruth(*maps)


@pytest.fixture(scope="module")
def found(maps: Found) -> Found:
    return reference.search(*maps)


def test_truth_is_the_oracle(maps: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    score, index = reference.search(*(x.double() for x in maps))
    monkeypatch.setattr("gate.STRIP_BYTES", 1)  # a strip of keys per row
    for limit in (1000, 20):
        truth = SearchTruth(*maps, limit=limit)
        assert len(truth.positions.unique()) == min(limit, 63)
        torch.testing.assert_close(truth.best, score.flatten()[truth.positions])
        torch.testing.assert_close(truth.index, index.flatten()[truth.positions])


def test_gate_accepts_the_right_result(truth: SearchTruth, found: Found) -> None:
    measured = truth.check(found)
    assert measured["index_agreement"] == 1
    assert measured["max_abs_error"] < 1e-6
    assert measured["checked_queries"] == 63


def runner_up(maps: Found, found: Found) -> Found:
    """The right score of the second best key, for one query."""
    q, k = (torch.nn.functional.unfold(x, 3, padding=1)[0] for x in maps)
    scores = torch.nn.functional.normalize(k, dim=0).T @ torch.nn.functional.normalize(q, dim=0)
    value, where = scores[:, 5].topk(2).values[1], scores[:, 5].topk(2).indices[1]
    score, index = (x.clone() for x in found)
    score.view(-1)[5], index.view(-1)[5] = value, where
    return score, index


def test_gate_refuses_a_worse_key(maps: Found, truth: SearchTruth, found: Found) -> None:
    with pytest.raises(WrongResult, match="below the maximum"):
        truth.check(runner_up(maps, found))
    assert truth.check(runner_up(maps, found), tolerance=1.0)["index_agreement"] == 62 / 63


def spoil(found: Found, score: float = 0.0, index: int = 0) -> Found:
    changed = (found[0].clone(), found[1].clone())
    changed[0].view(-1)[3] += score
    changed[1].view(-1)[3] += index
    return changed


@each(
    "change, message",
    [
        ({"score": 1e-5}, "off by 1.0e-05"),
        ({"score": float("nan")}, "off by nan"),
        ({"index": 48}, r"outside \[0, 48\)"),
        ({"index": -48}, r"outside \[0, 48\)"),
    ],
)
def test_gate_refuses(truth: SearchTruth, found: Found, change: dict, message: str) -> None:
    with pytest.raises(WrongResult, match=message):
        truth.check(spoil(found, **change))


def test_gate_of_a_batch() -> None:
    maps = make_maps(Size((4, 5), (6, 3), batch=3, channels=4))
    truth, found = SearchTruth(*maps), reference.search(*maps)
    assert truth.check(found) == pytest.approx(
        {"max_abs_error": 0, "max_loss": 0, "index_agreement": 1, "checked_queries": 60}, abs=1e-6
    )
    few = SearchTruth(*maps, limit=2)
    assert few.checked_images == len((few.positions // 20).unique()) < 3
    torch.testing.assert_close(few.best, truth.best[few.positions])
    assert few.check(found)["index_agreement"] == 1
    first_image = (found[0], found[1][:1].expand(3, -1, -1))
    with pytest.raises(WrongResult, match="below the maximum"):
        truth.check(first_image)


@each("name", ["unfold-tf32", "unfold-fp16", "triton-fp16", "triton-tf32", "triton-bf16"])
def test_gate_of_rounded_products_is_a_gate(name: str, truth: SearchTruth, found: Found) -> None:
    candidate = CANDIDATES[name]
    tolerances = (candidate.tolerance, candidate.score_tolerance)
    assert Candidate.tolerance < candidate.tolerance < 0.02
    truth.check(spoil(found, score=0.9 * candidate.score_tolerance), *tolerances)
    with pytest.raises(WrongResult, match="a score is off"):
        truth.check(spoil(found, score=1.1 * candidate.score_tolerance), *tolerances)
    with pytest.raises(WrongResult, match="below the maximum"):
        truth.check((found[0], torch.zeros_like(found[1])), *tolerances)


def test_fp16x3_is_held_to_what_fp32_is() -> None:
    for name in ("triton-fp32", "triton-fp16x3", "triton-fp16x3-graph", "torch-fp32"):
        candidate = CANDIDATES[name]
        assert candidate.tolerance == candidate.score_tolerance == 1e-6


def test_gate_refuses_another_shape(truth: SearchTruth, found: Found) -> None:
    with pytest.raises(WrongResult, match="shapes"):
        truth.check((found[0][:, :3], found[1][:, :3]))


@each("error, passes", [(0.9e-6, True), (1.1e-6, False), (float("nan"), False)])
def test_tensors_are_held_to_a_tolerance(error: float, passes: bool) -> None:
    want = torch.tensor([4.0, -8.0], dtype=torch.float64)
    got = want + torch.tensor([8 * error, 0.0])
    if passes:
        assert check_close("a", [got], [want], 1e-6)["max_relative_error"] == pytest.approx(error)
    else:
        with pytest.raises(WrongResult, match="a is off by"):
            check_close("a", [got], [want], 1e-6)
