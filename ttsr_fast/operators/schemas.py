"""The operators of the namespace `ttsr_fast`, by their schemas; `ops` says what they do.

They exist with or without the compiled libraries, which only implement them.
"""

import torch

_PATCH = "int kernel_size, int padding"
_SCORE = "str normalize, float eps, bool add_eps"
LIBRARY = torch.library.Library("ttsr_fast", "DEF")
LIBRARY.define(
    "search(Tensor query, Tensor key, Tensor? key_mask, "
    f"{_PATCH}, {_SCORE}, str precision, str? backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "gather_fold(Tensor value, Tensor index, Tensor? weight, "
    f"int stride, {_PATCH}, str divisor, str? backend) -> Tensor"
)
LIBRARY.define(
    "gather_fold_adjoint(Tensor grad, Tensor index, Tensor? weight, SymInt[] value_size, "
    f"int stride, {_PATCH}, str divisor, str? backend) -> Tensor"
)
LIBRARY.define(
    "gather_dot(Tensor value, Tensor grad, Tensor index, "
    f"int stride, {_PATCH}, str divisor, str? backend) -> Tensor"
)
LIBRARY.define(
    "search_backward(Tensor grad_score, Tensor query, Tensor key, Tensor score, Tensor index, "
    f"{_PATCH}, {_SCORE}, str? backend, bool[2] needed) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "search_transfer(Tensor query, Tensor key, Tensor? key_mask, Tensor[] values, int[] strides, "
    "str precision, str? backend) -> (Tensor, Tensor, Tensor[])"
)
LIBRARY.define(
    "search_transfer_backward(Tensor grad_score, Tensor[] grads, Tensor query, Tensor key, "
    "Tensor score, Tensor index, SymInt[] value_sizes, int[] strides, str? backend, bool[] needed)"
    " -> (Tensor, Tensor, Tensor[])"
)
# The compiled libraries, where they are loaded, implement these: the same with outputs to fill.
LIBRARY.define("cpp_isa() -> str")
LIBRARY.define(
    "cpp_search(Tensor query, Tensor key, Tensor? key_mask, Tensor(a!) score, Tensor(b!) index, "
    f"{_PATCH}, bool normalize_query, bool normalize_key, float eps, bool add_eps, "
    "bool bfloat16, Tensor? stop=None) -> ()"
)
LIBRARY.define(
    "cpp_gather_fold(Tensor value, Tensor index, Tensor? weight, Tensor(a!) out, "
    f"int stride, {_PATCH}, int key_height, int key_width, str divisor) -> ()"
)
LIBRARY.define(
    "cpp_gather_fold_adjoint(Tensor grad, Tensor index, Tensor? weight, Tensor(a!) out, "
    f"int stride, {_PATCH}, int key_height, int key_width, str divisor) -> ()"
)
LIBRARY.define(
    "cpp_gather_dot(Tensor value, Tensor grad, Tensor index, Tensor(a!) out, "
    f"int stride, {_PATCH}, int key_height, int key_width, str divisor) -> ()"
)
LIBRARY.define("cuda_version() -> int")
LIBRARY.define(
    "cuda_gather_fold(Tensor[] values, Tensor index, Tensor? weight, Tensor(a!)[] outs, "
    f"int[] strides, {_PATCH}, int key_height, int key_width, str divisor, bool check_index) -> ()"
)
LIBRARY.define(
    "cuda_gather_fold_adjoint(Tensor[] grads, Tensor index, Tensor csr_offsets, "
    f"Tensor csr_indices, Tensor? weight, Tensor(a!)[] outs, int[] strides, {_PATCH}, "
    "int key_height, int key_width, str divisor) -> ()"
)
LIBRARY.define(
    "cuda_gather_dot(Tensor value, Tensor grad, Tensor index, Tensor(a!) out, "
    f"int stride, {_PATCH}, int key_height, int key_width, str divisor, bool check_index) -> ()"
)
for _name in ("cuda_slab_search", "cuda_slab_argmax"):  # see kernels/slab_search.py
    LIBRARY.define(
        f"{_name}(Tensor query_rows, Tensor key_rows, Tensor scale, Tensor(a!) best, "
        "Tensor(b!) ring, int key_images, int depth, int batch, int batch_stride, "
        "int[] query_layout, int[] key_layout, int keys_per_thread, int rows_per_warp) -> ()"
    )
