"""Drop-in replacements for modules of existing RefSR code."""

from torch import Tensor, nn

from ttsr_fast.functional import search_transfer


class SearchTransfer(nn.Module):
    """TTSR's search and transfer: same signature, same results, memory linear in its inputs.

    Relevance embedding, hard attention and the confidence map of the texture transformer
    (arXiv 2006.04139, section 3.1). It has no parameters.

    Args:
        precision: as for `ttsr_fast.search`.
        backend: as for `ttsr_fast.search` and `ttsr_fast.gather_fold`, used for both: on a GPU
            `"triton"` searches with Triton, and transfers with what None would choose.

    Examples:
        >>> lrsr_lv3, refsr_lv3 = torch.rand(1, 256, 30, 40), torch.rand(1, 256, 32, 36)
        >>> ref_lv1, ref_lv2 = torch.rand(1, 64, 128, 144), torch.rand(1, 128, 64, 72)
        >>> ref_lv3 = torch.rand(1, 256, 32, 36)
        >>> transfer = SearchTransfer()
        >>> S, T_lv3, T_lv2, T_lv1 = transfer(lrsr_lv3, refsr_lv3, ref_lv1, ref_lv2, ref_lv3)
        >>> S.shape, T_lv1.shape
        (torch.Size([1, 1, 30, 40]), torch.Size([1, 64, 120, 160]))
    """

    def __init__(self, *, precision: str | None = None, backend: str | None = None) -> None:
        super().__init__()
        self.precision = precision
        self.backend = backend

    def forward(
        self,
        lrsr_lv3: Tensor,  # [N, C3, H, W]
        refsr_lv3: Tensor,  # [N or 1, C3, HK, WK]
        ref_lv1: Tensor,  # [N or 1, C1, 4*HK, 4*WK], up to 3 more rows and columns
        ref_lv2: Tensor,  # [N or 1, C2, 2*HK, 2*WK], up to 1 more row and column
        ref_lv3: Tensor,  # [N or 1, C3, HK, WK]
        *,
        key_mask: Tensor | None = None,  # [N or 1, HK, WK] bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Search `lrsr_lv3` in `refsr_lv3` and carry the textures of the reference over.

        Positions where `key_mask` is False are never matched, as for `ttsr_fast.search`; they still
        lie in the patches of those beside them.

        Returns:
            `S` `[N, 1, H, W]` (confidence, dtype of `lrsr_lv3`), `T_lv3` `[N, C3, H, W]`,
            `T_lv2` `[N, C2, 2*H, 2*W]`, `T_lv1` `[N, C1, 4*H, 4*W]` (dtype of their values).

        Raises:
            ValueError: a reference map of a size that does not fit the key grid.
            TypeError, ValueError, RuntimeError: as `search` and `gather_fold`.
        """
        # The level with the most work comes first, so that none is left with it at the end.
        match, (t_lv1, t_lv2, t_lv3) = search_transfer(
            lrsr_lv3,
            refsr_lv3,
            [ref_lv1, ref_lv2, ref_lv3],
            [4, 2, 1],
            names=["ref_lv1", "ref_lv2", "ref_lv3"],
            key_mask=key_mask,
            precision=self.precision,
            backend=self.backend,
        )
        return match.score.unsqueeze(1).to(lrsr_lv3.dtype), t_lv3, t_lv2, t_lv1

    def extra_repr(self) -> str:
        return f"precision={self.precision!r}, backend={self.backend!r}"
