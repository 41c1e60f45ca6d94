"""The items that a configuration asks for: to learn from, and held out."""

from typing import Any

from ttsr_fast.datasets import find_pairs
from ttsr_fast.training.config import Config
from ttsr_fast.training.datasets import PairDataset
from ttsr_fast.training.photographs import Photographs

Items = PairDataset | Photographs


def training_items(config: Config) -> Items:
    """Those of `data.root`.

    Raises:
        ValueError: it is not given; and what the data sets raise.
    """
    data = config.data
    if data.root is None:
        raise ValueError("data.root is needed: the folder of the pictures to learn from")
    return _items(config, data.root, data.layout, config.run.seed, data.augment, data.unrelated)


def validation_items(config: Config) -> Items | None:
    """Those of `data.validation`, the same in all epochs and all related; None if not given."""
    data = config.data
    if data.validation is None:
        return None
    layout = data.validation_layout or data.layout
    return _items(config, data.validation, layout, config.run.seed + 1, False, 0.0)


def _items(
    config: Config, root: str, layout: str, seed: int, augment: bool, unrelated: float | None
) -> Items:
    data = config.data
    common: dict[str, Any] = {
        "size": data.size,
        "augment": augment,
        "seed": seed,
        "on_error": data.on_error,
    }
    if layout == "photographs":
        return Photographs(
            root,
            crops_per_photo=data.crops_per_photo,
            unrelated=unrelated,
            candidates=data.candidates,
            longest=data.longest,
            **common,
        )
    references = data.references if layout == data.layout else None
    return PairDataset(find_pairs(root, layout, references=references), **common)
