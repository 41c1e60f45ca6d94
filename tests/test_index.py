"""The inverse of an index against counting by hand."""

import pytest
import torch

from ttsr_fast.operators.index import InverseIndex

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
    csr_offsets, csr_indices = InverseIndex(index).csr(35, groups)
    assert csr_offsets.dtype == csr_indices.dtype == torch.int32
    assert csr_offsets.shape == (35 * groups + 1,) and csr_indices.shape == (index.numel(),)
    flat = index.reshape(groups, -1)
    for group in range(groups):
        for key in range(35):
            row = group * 35 + key
            expected = (flat[group] == key).nonzero()[:, 0] + group * flat.shape[1]
            assert (
                csr_indices[csr_offsets[row] : csr_offsets[row + 1]].tolist() == expected.tolist()
            )
    assert csr_offsets[0] == 0 and csr_offsets[-1] == index.numel()


def test_sorted_once():
    inverse = InverseIndex(INDICES["random"]())
    assert inverse.csr(35, 3) is inverse.csr(35, 3)
    assert inverse.csr(35, 3) is not inverse.csr(35, 1)


@each(("keys", "rows"), [(35, 2**15), (2**31, 1)])
def test_more_than_32_bits_count(keys, rows):
    index = torch.zeros(1, 1, 1, dtype=torch.int64).expand(1, rows, 2**16)
    with pytest.raises(ValueError, match="less than 2.*31 positions"):
        InverseIndex(index).csr(keys, 1)
