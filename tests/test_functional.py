"""Bad input: every error names the argument and says what it should have been."""

import pytest
import torch

from ttsr_fast import gather_fold, search


def maps(*size, dtype=torch.float32, device="cpu"):
    return torch.zeros(size, dtype=dtype, device=device)


def mask(*size):
    return torch.ones(size, dtype=torch.bool)


SEARCH = {"query": maps(2, 3, 6, 7), "key": maps(2, 3, 5, 8)}

# what is changed, the error, what its message must hold
BAD_SEARCHES = {
    "query_list": ({"query": [1.0]}, TypeError, "query must be .*float.*, got list"),
    "query_integers": ({"query": maps(2, 3, 6, 7).int()}, TypeError, "query .*int32"),
    "query_complex": ({"query": maps(2, 3, 6, 7).cfloat()}, TypeError, "query .*complex64"),
    "query_rank": ({"query": maps(3, 6, 7)}, ValueError, r"query .*\[N, C, H, W\].*\[3, 6, 7\]"),
    "query_no_rows": ({"query": maps(2, 3, 0, 7)}, ValueError, r"query .*\[2, 3, 0, 7\]"),
    "query_no_channels": ({"query": maps(2, 0, 6, 7)}, ValueError, r"query .*\[2, 0, 6, 7\]"),
    "key_none": ({"key": None}, TypeError, "key must be .*got NoneType"),
    "key_rank": ({"key": maps(2, 3, 5, 8, 1)}, ValueError, r"key .*\[2, 3, 5, 8, 1\]"),
    "key_no_columns": ({"key": maps(2, 3, 5, 0)}, ValueError, r"key .*\[2, 3, 5, 0\]"),
    "key_integers": ({"key": maps(2, 3, 5, 8).long()}, TypeError, "key .*int64"),
    "key_dtype": ({"key": maps(2, 3, 5, 8).half()}, TypeError, "key .*float32 of query.*float16"),
    "key_device": ({"key": maps(2, 3, 5, 8, device="meta")}, ValueError, "key .*on cpu.*meta"),
    "key_batch": (
        {"key": maps(3, 3, 5, 8)},
        ValueError,
        r"key .*batch size 1 or 2.*\[3, 3, 5, 8\]",
    ),
    "key_channels": (
        {"key": maps(2, 4, 5, 8)},
        ValueError,
        r"key .*channels of query.*\[2, 4, 5, 8\]",
    ),
    "kernel_even": ({"kernel_size": 2}, ValueError, "kernel_size .*got 2"),
    "kernel_large": ({"kernel_size": 9}, ValueError, "kernel_size .*got 9"),
    "kernel_zero": ({"kernel_size": 0}, ValueError, "kernel_size .*got 0"),
    "kernel_float": ({"kernel_size": 3.0}, ValueError, r"kernel_size .*got 3\.0"),
    "padding_large": ({"padding": 2}, ValueError, "padding .*0 to 1, got 2"),
    "padding_negative": ({"padding": -1}, ValueError, "padding .*got -1"),
    "padding_float": ({"padding": 1.0}, ValueError, r"padding .*got 1\.0"),
    "padding_same": ({"padding": "same"}, ValueError, "padding .*got 'same'"),
    "query_small": (
        {"query": maps(2, 3, 2, 7), "padding": 0},
        ValueError,
        r"query \[2, 3, 2, 7\] is smaller than one patch of 3x3",
    ),
    "key_small": (
        {"key": maps(2, 3, 5, 4), "kernel_size": 7, "padding": 1},
        ValueError,
        "key .*7x7",
    ),
    "normalize": ({"normalize": "query"}, ValueError, "normalize .*got 'query'"),
    "eps_zero": ({"eps": 0.0}, ValueError, "eps must be finite and at least 1.2e-38, got 0.0"),
    "eps_negative": ({"eps": -1e-6}, ValueError, "eps must be finite and at least"),
    "eps_nan": (
        {"eps": float("nan")},
        ValueError,
        "eps must be finite and at least 1.2e-38, got nan",
    ),
    "add_eps": ({"add_eps": 1e-5}, TypeError, "add_eps must be True or False, got 1e-05"),
    "mask_dtype": ({"key_mask": mask(2, 5, 8).float()}, TypeError, "key_mask .*bool.*float32"),
    "mask_list": ({"key_mask": [True]}, TypeError, "key_mask .*got list"),
    "mask_rank": ({"key_mask": mask(5, 8)}, ValueError, r"key_mask .*\[2 or 1, 5, 8\].*\[5, 8\]"),
    "mask_shape": ({"key_mask": mask(2, 8, 5)}, ValueError, r"key_mask .*\[2, 8, 5\]"),
    "mask_batch": ({"key_mask": mask(3, 5, 8)}, ValueError, r"key_mask .*\[3, 5, 8\]"),
    "mask_grid": (
        {"key_mask": mask(2, 5, 8), "padding": 0},
        ValueError,
        r"key_mask .*\[2 or 1, 3, 6\] \(the key grid\)",
    ),
    "mask_device": ({"key_mask": mask(2, 5, 8).to("meta")}, ValueError, "key_mask .*on cpu.*meta"),
    "mask_empty": ({"key_mask": ~mask(1, 5, 8)}, ValueError, "key_mask .*at least one"),
    "mask_empty_image": (
        {"key_mask": torch.cat([mask(1, 5, 8), ~mask(1, 5, 8)])},
        ValueError,
        "key_mask .*every image",
    ),
    "precision": ({"precision": "fp8"}, ValueError, "precision .*got 'fp8'"),
    "precision_of_double": (
        {"query": maps(1, 3, 6, 7).double(), "key": maps(1, 3, 5, 8).double(), "precision": "fp32"},
        ValueError,
        "precision .*float64.*got 'fp32'",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "backend .*got 'cuda'"),
}

TRANSFER = {"value": maps(2, 3, 10, 16), "index": maps(2, 4, 5).long(), "stride": 2}

BAD_TRANSFERS = {
    "value_none": ({"value": None}, TypeError, "value must be .*got NoneType"),
    "value_integers": ({"value": maps(2, 3, 10, 16).int()}, TypeError, "value .*int32"),
    "value_rank": ({"value": maps(3, 10, 16)}, ValueError, r"value .*\[3, 10, 16\]"),
    "value_no_rows": ({"value": maps(2, 3, 0, 16)}, ValueError, r"value .*\[2, 3, 0, 16\]"),
    "value_batch": ({"value": maps(3, 3, 10, 16)}, ValueError, "value .*batch size 1 or 2"),
    "value_small": ({"value": maps(2, 3, 1, 16)}, ValueError, r"value \[2, 3, 1, 16\] .*stride 2"),
    "value_small_valid": (
        {"value": maps(2, 3, 5, 16), "padding": 0},
        ValueError,
        "value .*padding 0",
    ),
    "index_none": ({"index": None}, TypeError, "index must be .*got NoneType"),
    "index_int32": ({"index": maps(2, 4, 5).int()}, TypeError, "index .*int64.*int32"),
    "index_float": ({"index": maps(2, 4, 5)}, TypeError, "index .*int64.*float32"),
    "index_rank": ({"index": maps(2, 20).long()}, ValueError, r"index .*\[2, 20\]"),
    "index_device": ({"index": maps(2, 4, 5, device="meta").long()}, ValueError, "index .*on cpu"),
    "index_no_rows": ({"index": maps(2, 0, 5).long()}, ValueError, r"index .*\[2, 0, 5\]"),
    "index_no_rows_valid": (
        {"index": maps(2, 0, 5).long(), "padding": 0},
        ValueError,
        r"index .*\[2, 0, 5\]",
    ),
    "index_negative": (
        {"index": maps(2, 4, 5).long() - 1},
        ValueError,
        r"index .*\[0, 40\).*-1 to",
    ),
    "index_high": (
        {"index": maps(2, 4, 5).long() + 40},
        ValueError,
        r"index must lie in \[0, 40\) for the 5 x 8 key grid .* 40 to 40",
    ),
    "index_high_valid": (
        {"index": maps(2, 4, 5).long() + 18, "padding": 0},
        ValueError,
        r"index .*\[0, 18\) for the 3 x 6 key grid",
    ),
    "stride_zero": ({"stride": 0}, ValueError, "stride .*positive.*got 0"),
    "stride_float": ({"stride": 2.0}, ValueError, r"stride .*got 2\.0"),
    "kernel_even": ({"kernel_size": 4}, ValueError, "kernel_size .*got 4"),
    "kernel_float": ({"kernel_size": 3.0}, ValueError, r"kernel_size .*got 3\.0"),
    "padding_large": ({"padding": 2}, ValueError, "padding .*0 to 1, got 2"),
    "padding_negative": ({"padding": -1}, ValueError, "padding .*got -1"),
    "divisor": ({"divisor": "mean"}, ValueError, "divisor .*got 'mean'"),
    "weight_list": ({"weight": [1.0]}, TypeError, "weight .*got list"),
    "weight_integers": ({"weight": maps(2, 4, 5).long()}, TypeError, "weight .*int64"),
    "weight_shape": ({"weight": maps(2, 5, 4)}, ValueError, r"weight .*\[2, 4, 5\].*\[2, 5, 4\]"),
    "weight_batch": ({"weight": maps(1, 4, 5)}, ValueError, r"weight .*\[1, 4, 5\]"),
    "weight_device": ({"weight": maps(2, 4, 5, device="meta")}, ValueError, "weight .*on cpu"),
    "backend": ({"backend": "cuda"}, ValueError, "backend .*got 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_SEARCHES.values(), ids=BAD_SEARCHES)
def test_bad_search(change, error, message):
    arguments = {**SEARCH, **change}
    with pytest.raises(error, match=f"^{message}") as caught:
        search(arguments.pop("query"), arguments.pop("key"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "error", "message"), BAD_TRANSFERS.values(), ids=BAD_TRANSFERS)
def test_bad_transfer(change, error, message):
    arguments = {**TRANSFER, **change}
    with pytest.raises(error, match=f"^{message}") as caught:
        gather_fold(arguments.pop("value"), arguments.pop("index"), **arguments)
    assert "\n" not in str(caught.value)


def test_the_unchanged_arguments_are_good():
    score, index = search(**SEARCH)
    assert not score.any() and not index.any()
    assert not gather_fold(**TRANSFER).any()
    last = {**TRANSFER, "index": TRANSFER["index"] + 39, "value": torch.ones(2, 3, 11, 17)}
    assert gather_fold(**last).any()


def test_bad_input_inside_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        score, _ = search(SEARCH["query"].half(), SEARCH["key"].bfloat16())
        assert score.dtype == torch.float32
        with pytest.raises(ValueError, match="key must be on cpu"):
            search(SEARCH["query"], SEARCH["key"].to("meta"))
