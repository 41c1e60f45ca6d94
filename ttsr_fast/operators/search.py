"""`search`: schema, work, fake, gradient.

The gradient goes through the two patches of every match and their norms, so it is written in
`gather_fold` and its transpose: nothing is unfolded in a backward pass either.
"""

from typing import Any

import torch
from torch import Tensor

from ttsr_fast.operators import backends
from ttsr_fast.operators.gather_fold import fold, fold_adjoint, gather_dot
from ttsr_fast.operators.index import InverseIndex, at_index
from ttsr_fast.operators.patch import (
    PATCH,
    SCORE,
    Patch,
    Score,
    Transfer,
    empty_like,
    patch_norm,
    patch_sum,
    patch_sum_transpose,
    sum_dtype,
)
from ttsr_fast.operators.registry import (
    Function,
    call_without_derivative,
    is_plain,
    register,
    register_derivative,
    register_without_derivative,
    under_transform,
    untraced,
)

# --- search ---

SEARCH = (
    f"search(Tensor query, Tensor key, Tensor? key_mask, {PATCH}, {SCORE}, str precision, "
    "str? backend) -> (Tensor, Tensor)"
)


def _search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    *options: Any,
) -> tuple[Tensor, Tensor]:  # [N, Ho, Wo] twice
    patch, scoring, precision, backend = _split(options)
    # On other devices this would synchronise.
    if key_mask is not None and query.is_cpu and not bool(key_mask.flatten(1).any(1).all()):
        raise ValueError("key_mask must leave at least one key position True in every image")
    run = backends.choose("search", query, backend)
    match = _empty_match(query, patch)
    if match[0].numel():
        run(query, key, key_mask, match, patch, scoring, precision)
    return match


def _fake_search(query: Tensor, key: Tensor, key_mask: Tensor | None, *options: Any) -> Any:
    return _empty_match(query, _split(options)[0])


def _empty_match(query: Tensor, patch: Patch) -> tuple[Tensor, Tensor]:
    grid = patch.grid(*query.shape[2:])
    score = query.new_empty(query.shape[0], *grid, dtype=sum_dtype(query.dtype))
    return score, torch.empty_like(score, dtype=torch.int64)


def _split(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Patch, Score, and the options behind them."""
    return Patch(*options[:2]), Score(*options[2:5]), *options[5:]


search = register(SEARCH, _search, _fake_search)


# --- gradient ---

SEARCH_BACKWARD = (
    "search_backward(Tensor grad_score, Tensor query, Tensor key, Tensor score, Tensor index, "
    f"{PATCH}, {SCORE}, str? backend, bool[2] needed) -> (Tensor, Tensor)"
)


def _search_backward(
    grad_score: Tensor,  # [N, Ho, Wo]
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    score: Tensor,  # [N, Ho, Wo]
    index: Tensor,  # [N, Ho, Wo]
    *options: Any,
) -> tuple[Tensor, Tensor]:  # shapes of query and key; empty where not needed
    """Gradient through the matched patches and their norms.

    With i = index[j], g the gradient of score[j] and n the denominator of a patch: the product of
    the patches has gradient g / (n_i n_j) in each factor, and a norm that n varies with pulls on
    every pixel x of its patch by -g score x / (n norm), summed over the patches that hold x.
    """
    patch, scoring, backend, needed = _split(options)
    _check_backward(grad_score, query, key, score, index, patch)
    grad_query, grad_key = query.new_empty(0), key.new_empty(0)
    if not any(needed):
        return grad_query, grad_key
    weight, query_pull, key_pull = grad_score, None, None
    whole, pixel = Transfer([1], patch, "none"), Transfer([1], Patch(1, 0), "none")
    if scoring.of_key:
        norm = patch_norm(key, patch)
        key_grid = list(norm.shape)
        (matched,) = fold([norm], index, None, pixel, backend)
        denominator = scoring.denominator(matched)
        weight = weight / denominator[:, 0]
        pull = (grad_score * score).unsqueeze(1) / (denominator * matched)
        key_pull = torch.where(matched > scoring.varies_above, pull, 0)
    if scoring.of_query:
        norm = patch_norm(query, patch)[:, 0]
        denominator = scoring.denominator(norm)
        weight = weight / denominator
        pull = grad_score * score / (denominator * norm)
        query_pull = torch.where(norm > scoring.varies_above, pull, 0).unsqueeze(1)

    if needed[0]:
        (grad_query,) = fold([key], index, weight, whole, backend)
        if query_pull is not None:
            grad_query -= query * patch_sum_transpose(query_pull, patch).to(query.dtype)
    if needed[1]:
        inverse = InverseIndex(index)
        (grad_key,) = fold_adjoint([query], inverse, weight, [list(key.shape)], whole, backend)
        if key_pull is not None:
            (pull,) = fold_adjoint([key_pull], inverse, None, [key_grid], pixel, backend)
            grad_key -= key * patch_sum_transpose(pull, patch).to(key.dtype)
    return grad_query, grad_key


def _check_backward(
    grad_score: Tensor, query: Tensor, key: Tensor, score: Tensor, index: Tensor, patch: Patch
) -> None:
    fits = query.dim() == key.dim() == 4 and key.shape[0] in (1, query.shape[0])
    if fits:
        grid = (len(query), *patch.grid(*query.shape[2:]))
        fits = grid == index.shape == score.shape == grad_score.shape
    if not fits or query.shape[1] != key.shape[1]:
        shapes = [list(x.shape) for x in (grad_score, query, key, score, index)]
        raise ValueError(f"shapes of grad_score, query, key, score and index do not fit: {shapes}")


def _fake_search_backward(grad_score: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Any:
    needed = rest[-1]
    return (
        empty_like(key, list(query.shape)) if needed[0] else query.new_empty(0),
        empty_like(query, list(key.shape)) if needed[1] else key.new_empty(0),
    )


search_backward = register(SEARCH_BACKWARD, _search_backward, _fake_search_backward)
register_without_derivative(search_backward)


# --- derivative ---


class Search(Function):
    """`search` with its gradient and its tangent."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return search(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, _, *options, _, backend = inputs
        score, index = output
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(query, key, score, index)
        ctx.save_for_forward(query, key, score, index)
        ctx.options = (*options, backend)

    @staticmethod
    def backward(ctx: Any, grad_score: Tensor, _: None) -> tuple[Any, ...]:
        needed = list(ctx.needs_input_grad[:2])
        arguments = (grad_score, *ctx.saved_tensors, *ctx.options, needed)
        grads = call_without_derivative(search_backward, *arguments)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 8

    @staticmethod
    def jvp(ctx: Any, d_query: Tensor | None, d_key: Tensor | None, *_: None) -> tuple[Any, ...]:
        """Derivative of <q, k> / (n_q n_k), the index held constant.

        Inside a `jvp` PyTorch's operators drop the tangents of a `jvp` around it; here every
        tangent goes through `WithoutDerivative` first, which refuses that.
        """
        query, key, score, index = ctx.saved_tensors
        *options, backend = ctx.options
        patch, scoring = Patch(*options[:2]), Score(*options[2:])
        transfer = (index, [1], *patch, "none", backend)
        product, pull = torch.zeros_like(score), torch.zeros_like(score)
        if d_query is not None:
            maps = ([key], [d_query.to(key.dtype)])
            product = product + call_without_derivative(gather_dot, *maps, *transfer)
        if d_key is not None:
            maps = ([d_key.to(key.dtype)], [query])
            product = product + call_without_derivative(gather_dot, *maps, *transfer)
        if scoring.of_key:
            by, d_log = (at_index(x, index) for x in _denominator(key, d_key, patch, scoring))
            product, pull = product / by, pull + d_log
        if scoring.of_query:
            by, d_log = (x[:, 0] for x in _denominator(query, d_query, patch, scoring))
            product, pull = product / by, pull + d_log
        return product - score * pull, None


def _denominator(
    x: Tensor,  # [N, C, H, W]
    d_x: Tensor | None,
    patch: Patch,
    scoring: Score,
) -> tuple[Tensor, Tensor]:  # [N, 1, Ho, Wo] twice
    """Denominators of all patches, and the tangents of their logarithms."""
    norm = patch_norm(x, patch)
    by = scoring.denominator(norm)
    if d_x is None:
        return by, torch.zeros_like(by)
    product = (x.to(norm.dtype) * d_x.to(norm.dtype)).sum(1, keepdim=True)
    d_norm = patch_sum(product, patch) / norm
    return by, torch.where(norm > scoring.varies_above, d_norm, 0) / by


register_derivative(search, Search.record)


def call_search(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator, or its work alone, or what a transform of torch.func can differentiate."""
    if is_plain(*arguments[:3]):
        return _search(*arguments)
    return untraced(Search.apply, *arguments) if under_transform() else search(*arguments)
