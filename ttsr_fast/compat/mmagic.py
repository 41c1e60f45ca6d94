"""The search of TTSR (arXiv 2006.04139) as mmagic has it."""

from collections.abc import Sequence

from torch import Tensor, nn

from ttsr_fast.functional import search_transfer


class SearchTransformer(nn.Module):
    """mmagic's search and transfer: same arguments, same results, memory linear in its inputs.

    In a configuration, with mmengine 0.8 or newer, nothing else changes:

    ```diff
    -    transformer=dict(type='SearchTransformer'),
    +    transformer=dict(type='ttsr_fast.compat.SearchTransformer'),
    ```

    It has no parameters.

    Args:
        precision: as for `ttsr_fast.SearchTransfer`.
        backend: as for `ttsr_fast.SearchTransfer`.
    """

    def __init__(self, *, precision: str | None = None, backend: str | None = None) -> None:
        super().__init__()
        self.precision = precision
        self.backend = backend

    def forward(
        self,
        img_lq: Tensor,  # [N, C, H, W]
        ref_lq: Tensor,  # [N or 1, C, HK, WK]
        refs: Sequence[Tensor],  # [N or 1, Ci, 2**i * HK, 2**i * WK] for i = 0, 1, ...
    ) -> tuple[Tensor, list[Tensor]]:
        """Search `img_lq` in `ref_lq` and carry the textures of `refs` over.

        Args:
            img_lq: features of the image to match.
            ref_lq: features of the image to search.
            refs: tuple or list of the features to take, from the smallest level to the largest, any
                number of them; level i may have up to 2**i - 1 more rows and columns.

        Returns:
            `soft_attention` `[N, 1, H, W]` (dtype of `img_lq`), and the list of `textures`
            `[N, Ci, 2**i * H, 2**i * W]` in the order of `refs`.

        Raises:
            TypeError, ValueError, RuntimeError: as `ttsr_fast.SearchTransfer`, where `img_lq` is
                the query and `ref_lq` the key.
        """
        if not isinstance(refs, (tuple, list)) or not refs:
            kind = "an empty one" if isinstance(refs, (tuple, list)) else type(refs).__name__
            raise TypeError(f"refs must be a tuple or list of tensors, got {kind}")
        levels = range(len(refs) - 1, -1, -1)  # the most work first, as in SearchTransfer
        match, textures = search_transfer(
            img_lq,
            ref_lq,
            [refs[level] for level in levels],
            [2**level for level in levels],
            names=[f"refs[{level}]" for level in levels],
            precision=self.precision,
            backend=self.backend,
        )
        return match.score.unsqueeze(1).to(img_lq.dtype), textures[::-1]

    def extra_repr(self) -> str:
        return f"precision={self.precision!r}, backend={self.backend!r}"
