"""The inverse of an index against counting by hand."""

import pytest
import torch

from ttsr_fast.operators.choosers import Choosers

each = pytest.mark.parametrize
INDICES = {
    "random": lambda: torch.randint(35, (3, 6, 7)),
    "same_key": lambda: torch.full((3, 6, 7), 34),
    "every_second": lambda: 2 * torch.randint(17, (3, 7, 6)).mT,
    "one": lambda: torch.zeros(1, 1, 1, dtype=torch.int64),
}


@each("together", [False, True])
@each("kind", INDICES)
def test_every_key_has_its_queries_in_ascending_order(kind, together):
    index = INDICES[kind]()
    groups = 1 if together else len(index)
    begin, order = Choosers(index).of(35, groups)
    assert begin.dtype == order.dtype == torch.int32
    assert begin.shape == (35 * groups + 1,) and order.shape == (index.numel(),)
    flat = index.reshape(groups, -1)
    for group in range(groups):
        for key in range(35):
            row = group * 35 + key
            expected = (flat[group] == key).nonzero()[:, 0] + group * flat.shape[1]
            assert order[begin[row] : begin[row + 1]].tolist() == expected.tolist()
    assert begin[0] == 0 and begin[-1] == index.numel()


def test_sorted_once():
    choosers = Choosers(INDICES["random"]())
    assert choosers.of(35, 3) is choosers.of(35, 3)
    assert choosers.of(35, 3) is not choosers.of(35, 1)


@each(("keys", "rows"), [(35, 2**15), (2**31, 1)])
def test_more_than_32_bits_count(keys, rows):
    index = torch.zeros(1, 1, 1, dtype=torch.int64).expand(1, rows, 2**16)
    with pytest.raises(ValueError, match="less than 2.*31 positions"):
        Choosers(index).of(keys, 1)
