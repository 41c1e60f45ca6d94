"""The fine search and the transfer of MASA-SR (arXiv 2106.02299), of blocks with a margin.

In `models/archs/MASA_arch.py`, at the end of the class, after the methods of these names:

```diff
 class MASA(nn.Module):
     ...
+    search_org = staticmethod(masa.search_org)
+    transfer = staticmethod(masa.transfer)
```

with `from ttsr_fast.compat import masa` at the top. The coarse `MASA.search` stays MASA's own: it
adds up the similarities of patches at three dilations, and has one query for each block only.
"""

import torch.nn.functional as F
from torch import Tensor

from ttsr_fast.functional import gather_fold, search


def search_org(
    lr: Tensor,  # [N, C, H, W]
    reflr: Tensor,  # [N, C, HK, WK]
    ks: int = 3,
    pd: int = 1,
    stride: int = 1,
    *,
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [N, H-2, W-2, 1], [N, H-2, W-2, 1] int64
    """For every patch that lies inside `lr`, the most similar one inside `reflr`.

    Args:
        lr: blocks of features, each with a margin of one pixel.
        reflr: the same of the reference.
        ks: 3, for which alone MASA's own search works.
        pd: of no effect, as in MASA: the margin stands in for padding.
        stride: 1, for which alone MASA's own search works.
        precision: as for `ttsr_fast.search`.
        backend: as for `ttsr_fast.search`.

    Returns:
        The cosine similarity (dtype of `lr`), differentiable once in both maps, and the position
        among the `HK-2 x WK-2` patches, row by row, of the best patch alone (`num_nbr = 1`, MASA's
        default and all that its network reads), the first among equals.

    Raises:
        TypeError, ValueError, RuntimeError: `ks` or `stride` is another; and as `search`, where
            `lr` is the query and `reflr` the key.
    """
    if (ks, stride) != (3, 1):
        raise ValueError(f"ks must be 3 and stride 1, got {ks!r} and {stride!r}")
    score, index = search(lr, reflr, padding=0, precision=precision, backend=backend)
    return score.unsqueeze(3).to(lr.dtype), index.unsqueeze(3)


def transfer(
    fea: Tensor,  # [N, C, HV, WV]
    index: Tensor,  # [N, H, W] int64
    soft_att: Tensor,  # [N, 1, H, W]
    ks: int = 3,
    pd: int = 1,
    stride: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:  # [N, C, stride*H, stride*W]
    """The patches of `fea` at `index`, averaged where they overlap, times the soft attention.

    Args:
        fea: features with a margin of `pd` pixels, which stands in for padding.
        index: positions among the patches inside `fea`, row by row, as `search_org` finds them.
        soft_att: resized to the output bilinearly.
        ks: side of a patch in pixels: 1, 3, 5 or 7 times `stride`.
        pd: `(ks - stride) / 2`, for which alone the patches fit the output.
        stride: pixels per position: 1, 2 and 4 in MASA.
        backend: as for `ttsr_fast.gather_fold`.

    Returns:
        `[N, C, stride*H, stride*W]`, differentiable once in `fea` and `soft_att`.

    Raises:
        TypeError, ValueError, RuntimeError: `ks` or `pd` does not fit `stride`, `soft_att` is no
            map; and as `gather_fold`, where `fea` is the value.
    """
    integers = all(isinstance(n, int) for n in (ks, pd, stride)) and stride > 0
    if not integers or ks not in [n * stride for n in (1, 3, 5, 7)] or 2 * pd != ks - stride:
        raise ValueError(
            f"ks must be 1, 3, 5 or 7 times stride and pd (ks - stride) / 2, got ks {ks!r}, "
            f"pd {pd!r} and stride {stride!r}"
        )
    if not isinstance(soft_att, Tensor) or not soft_att.is_floating_point():
        kind = soft_att.dtype if isinstance(soft_att, Tensor) else type(soft_att).__name__
        raise TypeError(f"soft_att must be a floating-point tensor, got {kind}")
    if soft_att.dim() != 4 or soft_att.shape[1] != 1:
        raise ValueError(f"soft_att must be [N, 1, H, W], got {list(soft_att.shape)}")
    out = gather_fold(
        fea,
        index,
        stride=stride,
        kernel_size=ks // stride,
        padding=0,
        divisor="overlap",
        backend=backend,
    )
    out = out[..., pd : out.shape[2] - pd, pd : out.shape[3] - pd]
    return out * F.interpolate(soft_att, size=out.shape[2:], mode="bilinear")
