"""The patch search of C2-Matching (arXiv 2106.01863), DATSR (2207.11938), MRefSR (2303.04970)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast.functional import search

EPS = 1e-5  # added to every norm
SEARCHED = (1, 3, 5, 7)  # sizes of patches that are never formed


def feature_match_index(
    feat_input: Tensor,  # [C, H, W]
    feat_ref: Tensor,  # [C, HK, WK]
    patch_size: int = 3,
    input_stride: int = 1,
    ref_stride: int = 1,
    is_norm: bool = True,
    norm_input: bool = False,
    *,
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [Ho, Wo] int64, [Ho, Wo]
    """For every patch of the input, the position and the similarity of the best reference patch.

    In `mmsr/models/archs/corres_generation_arch.py` of C2-Matching, and in DATSR's
    `datsr/models/archs/flow_similarity_corres_generation_arch.py` and MRefSR's
    `basicsr/archs/corres_generation_arch.py`:

    ```diff
    -from mmsr.models.archs.ref_map_util import feature_match_index
    +from ttsr_fast.compat import feature_match_index
    ```

    The import to replace reads `datsr.models.archs.ref_map_util` and `.ref_map_util` in the others.

    The similarity is the inner product of two patches. Patches lie wholly inside their map, one
    every stride pixels, so that the grid is `Ho = (H - patch_size) // input_stride + 1` high.

    Args:
        feat_input: `[C, H, W]`, float64, float32, float16 or bfloat16. The callers divide every
            pixel by its norm first.
        feat_ref: `[C, HK, WK]`, of the dtype of `feat_input`.
        patch_size: side of a patch, 1 or more.
        input_stride: pixels from one patch to the next. At stride 1 with a `patch_size` of 1, 3, 5
            or 7 no patch is formed; otherwise the patches of both maps are, which takes
            (patch_size / stride)**2 times the memory of each map.
        ref_stride: the same in the reference.
        is_norm: divide a reference patch by its norm plus 1e-5.
        norm_input: divide an input patch by its norm plus 1e-5. Changes no choice.
        precision: as for `ttsr_fast.search`.
        backend: as for `ttsr_fast.search`.

    Returns:
        `max_idx`: the best reference patch, counted row by row in the reference's grid (which these
        projects' `index_to_flow` takes to be as wide as the input's), the first among equals.
        `max_val`: its similarity, in the dtype of `feat_input`, differentiable once in both maps.
        What is not finite counts as in `search`.

    Raises:
        TypeError, ValueError, RuntimeError: as `search`, where `feat_input` is the query and
            `feat_ref` the key.
    """
    sizes = {"patch_size": patch_size, "input_stride": input_stride, "ref_stride": ref_stride}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    _check_map("feat_input", feat_input, patch_size)
    _check_map("feat_ref", feat_ref, patch_size)
    if feat_ref.shape[0] != feat_input.shape[0]:
        raise ValueError(
            f"feat_ref must have the channels of feat_input {list(feat_input.shape)}, "
            f"got {list(feat_ref.shape)}"
        )
    query, key = feat_input.unsqueeze(0), feat_ref.unsqueeze(0)
    if patch_size not in SEARCHED or max(input_stride, ref_stride) > 1:
        query = _as_pixels(query, patch_size, input_stride)
        key = _as_pixels(key, patch_size, ref_stride)
        patch_size = 1
    score, index = search(
        query,
        key,
        kernel_size=patch_size,
        padding=0,
        normalize="key" if is_norm else "none",
        eps=EPS,
        add_eps=True,
        precision=precision,
        backend=backend,
    )
    if norm_input:
        score = score / (_patch_norm(query, patch_size) + EPS)
    return index[0], score[0].to(feat_input.dtype)


def _check_map(name: str, x: Tensor, patch_size: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if x.dim() != 3 or x.shape[0] == 0 or min(x.shape[1:]) < patch_size:
        raise ValueError(
            f"{name} must be [C, H, W] and hold a patch of {patch_size}x{patch_size}, "
            f"got {list(x.shape)}"
        )


def _as_pixels(x: Tensor, size: int, stride: int) -> Tensor:  # [1, C*size*size, Ho, Wo]
    """The patches as the pixels of another map."""
    grid = [(n - size) // stride + 1 for n in x.shape[2:]]
    return F.unfold(x, size, stride=stride).unflatten(2, grid)


def _patch_norm(x: Tensor, size: int) -> Tensor:  # [1, Ho, Wo]
    """Norm of every patch; a patch of zeros has no gradient, as in `torch.norm`."""
    work = torch.promote_types(x.dtype, torch.float32)
    squared = torch.linalg.vector_norm(x, dim=1, dtype=work).square()
    squared = F.avg_pool2d(squared, size, stride=1, divisor_override=1)
    return squared.clamp(min=torch.finfo(work).tiny).sqrt()
