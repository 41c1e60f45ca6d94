"""Checkpoints: official, mmagic and own files; reading, checking, renaming, writing.

Files are read as tensors only (`weights_only=True` or safetensors): no code in a file is ever run.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttsr_fast.choices import CHECKPOINTS
from ttsr_fast.files import shown
from ttsr_fast.model import tensor_files
from ttsr_fast.model.ttsr import TTSR

_logger = logging.getLogger(__name__)

# Prefixes of names, official and mmagic's; the rest of each name is the same in both.
_MMAGIC_NAMES = {
    "MainNet.SFE.conv_head.": "generator.sfe.conv_first.",
    "MainNet.SFE.RBs.": "generator.sfe.body.",
    "MainNet.SFE.conv_tail.": "generator.sfe.conv_last.",
    "MainNet.conv11_head.": "generator.conv_first1.",
    "MainNet.RB11.": "generator.res_block1.",
    "MainNet.conv11_tail.": "generator.conv_last1.",
    "MainNet.conv12.": "generator.up1.upsample_conv.",
    "MainNet.conv22_head.": "generator.conv_first2.",
    "MainNet.ex12.conv12.": "generator.csfi2.conv1to2.",
    "MainNet.ex12.conv21.": "generator.csfi2.conv2to1.",
    "MainNet.ex12.conv_merge": "generator.csfi2.conv_merge",
    "MainNet.RB21.": "generator.res_block2_1.",
    "MainNet.RB22.": "generator.res_block2_2.",
    "MainNet.conv21_tail.": "generator.conv_last2_1.",
    "MainNet.conv22_tail.": "generator.conv_last2_2.",
    "MainNet.conv23.": "generator.up2.upsample_conv.",
    "MainNet.conv33_head.": "generator.conv_first3.",
    "MainNet.ex123.conv12.": "generator.csfi3.conv1to2.",
    "MainNet.ex123.conv13.": "generator.csfi3.conv1to4.",
    "MainNet.ex123.conv21.": "generator.csfi3.conv2to1.",
    "MainNet.ex123.conv23.": "generator.csfi3.conv2to4.",
    "MainNet.ex123.conv31_1.": "generator.csfi3.conv4to1_1.",
    "MainNet.ex123.conv31_2.": "generator.csfi3.conv4to1_2.",
    "MainNet.ex123.conv32.": "generator.csfi3.conv4to2.",
    "MainNet.ex123.conv_merge1.": "generator.csfi3.conv_merge1.",
    "MainNet.ex123.conv_merge2.": "generator.csfi3.conv_merge2.",
    "MainNet.ex123.conv_merge3.": "generator.csfi3.conv_merge4.",
    "MainNet.RB31.": "generator.res_block3_1.",
    "MainNet.RB32.": "generator.res_block3_2.",
    "MainNet.RB33.": "generator.res_block3_3.",
    "MainNet.conv31_tail.": "generator.conv_last3_1.",
    "MainNet.conv32_tail.": "generator.conv_last3_2.",
    "MainNet.conv33_tail.": "generator.conv_last3_3.",
    "MainNet.merge_tail.conv13.": "generator.merge_features.conv1to4.",
    "MainNet.merge_tail.conv23.": "generator.merge_features.conv2to4.",
    "MainNet.merge_tail.conv_merge.": "generator.merge_features.conv_merge.",
    "MainNet.merge_tail.conv_tail1.": "generator.merge_features.conv_last1.",
    "MainNet.merge_tail.conv_tail2.": "generator.merge_features.conv_last2.",
    "LTE.slice": "extractor.slice",
    "LTE.sub_mean.": "extractor.img_normalize.",
}
_OFFICIAL_NAMES = {theirs: ours for ours, theirs in _MMAGIC_NAMES.items()}

# Other tensors in files: copies of LTE, and the rest of a training.
_IGNORED = (
    "LTE_copy.",
    "extractor_copy.",
    "discriminator.",
    "perceptual_loss.",
    "transferal_perceptual_loss.",
    "step_counter",
    "n_averaged",
)

# Keys of the tensors, first choice first. In files of BasicSR, and in files with `g_ema`, the
# average is the result by convention; elsewhere it is not.
_CONTAINERS = (
    *("state_dict", "params_ema", "params", "model_state_dict", "model", "generator", "net_g"),
    *("g_ema", "g", "net", "network", "module", "weights", "ema", "model_ema", "state_dict_ema"),
)
_DEPTH = 4  # containers in containers
_LONGEST = 200  # characters of a name in a message

# Prefixes of wrappers: of all names of a model, and of the names of a part.
_WRAPPERS = {"module", "model", "net", "network"}
_PART_WRAPPERS = r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def load_model(
    path: str | os.PathLike[str],
    *,
    res_scale: float = 1.0,
    soft_attention: bool = True,
    precision: str | None = None,
    backend: str | None = None,
) -> TTSR:
    """A trained model in evaluation mode, on the CPU, in the default dtype.

    Supported are the official file, mmagic's, and files of `save_model`. Names may have prefixes of
    wrappers (`module.`, `_orig_mod.`), and the tensors may be in a container, see `read_tensors`.
    The tensors determine channels, numbers of residual blocks, hard attention and CSFI.

    Args:
        path: `.safetensors`, or any other suffix for a file written by `torch.save`.
        res_scale: as trained; a checkpoint does not contain it. Published weights have 1.
        soft_attention: as trained; a checkpoint does not contain it. Published weights have it.
        precision: as for `ttsr_fast.search`.
        backend: as for `ttsr_fast.search`.

    Raises:
        RuntimeError: the file cannot be read or is damaged, or safetensors is not installed.
        ValueError: the file does not hold the tensors of a TTSR; the message names tensors that are
            missing, superfluous or of the wrong shape, or hold NaN or infinity.
    """
    state = _official(read_tensors(path))
    options = {"soft_attention": soft_attention, "precision": precision, "backend": backend}
    model = _empty_model(state, path, res_scale=res_scale, **options)
    model.to_empty(device="cpu").load_state_dict(state)
    bad = [name for name, x in model.state_dict().items() if not x.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds NaN or infinity in {len(bad)} tensors ({_some(bad)})")
    return model.eval()


def save_model(model: TTSR, path: str | os.PathLike[str]) -> None:
    """Write the tensors of `model` under their official names; an existing file is replaced.

    Args:
        model: the model itself, not wrapped.
        path: `.safetensors`, or `.pt` or `.pth` for `torch.save`; the folder must exist. The file
            appears whole or not at all.

    Raises:
        TypeError: `model` is no TTSR.
        ValueError: another suffix, or no such folder.
        OSError: the file cannot be written; the message names it and the reason.
        RuntimeError: safetensors is not installed.
    """
    if not isinstance(model, TTSR):
        raise TypeError(f"model must be a TTSR, unwrapped, got {type(model).__name__}")
    path = _checked_path(path)
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    tensor_files.save(state, path)


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "official",
    half: bool = False,
) -> list[str]:
    """Write the generator of a checkpoint under the names of another project, bit for bit.

    Args:
        source: a file that `load_model` takes.
        target: `.safetensors`, or `.pt` or `.pth` for `torch.save`, the only ones for mmagic. The
            new file replaces it when complete.
        to: "official": the authors' names, in the order of their file; "mmagic": its names, under
            `"state_dict"`.
        half: whether to round to float16; otherwise each tensor keeps its type.

    Returns:
        Names in `source` of tensors that are left out: copies of LTE, and the rest of a training.
        Data beside `"state_dict"` is left out too, and not listed.

    Raises:
        RuntimeError: the file cannot be read, or safetensors is not installed.
        ValueError: it is no TTSR checkpoint, `target` is `source` or has another suffix, an unknown
            `to`, a number beyond float16.
        OSError: `target` cannot be written.
    """
    if to not in CHECKPOINTS:
        raise ValueError(f"to must be 'official' or 'mmagic', got {to!r}")
    path = _checked_path(target)
    if to == "mmagic" and path.suffix == ".safetensors":
        raise ValueError(f"mmagic reads .pth files, got {path}")
    if path.exists() and Path(source).is_file() and path.samefile(source):
        raise ValueError(f"the result must be another file than {source}")
    tensors = read_tensors(source)
    state = _official(tensors)
    names = _empty_model(state, source).state_dict()  # in the official order
    state = {name: state[name].clone(memory_format=torch.contiguous_format) for name in names}
    if half:
        state = {name: _halved(name, x) for name, x in state.items()}
    tensor_files.save(state if to == "official" else {"state_dict": to_mmagic(state)}, path)
    return [name for name in _unwrapped(tensors) if name.startswith(_IGNORED)]


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, names and dtypes as they are.

    Args:
        path: `.safetensors`, or any other suffix for a file written by `torch.save`: a dict of
            tensors, or a dict with one under `"state_dict"`, `"params_ema"`, `"params"`, `"model"`
            or another usual name. With several of them, a warning names the one used.

    Raises:
        RuntimeError: the file cannot be read or is damaged, or safetensors is not installed.
        ValueError: the file holds other data.
    """
    content, place = _contained(tensor_files.load(path), path)
    if not _is_state(content):
        raise ValueError(
            f"{path} must hold a dict of tensors by name, alone or under 'state_dict', 'params', "
            f"'model' or the like, got {_described(content)}{place}"
        )
    odd = [name for name, x in content.items() if not _is_plain(x)]
    if odd:
        raise ValueError(f"{path} must hold dense tensors with values, got others ({_some(odd)})")
    return dict(content)


def _contained(content: Any, path: str | os.PathLike[str]) -> tuple[Any, str]:
    """Content of the innermost container of a file, and words for its place."""
    place = ""
    for _ in range(_DEPTH):
        if not isinstance(content, dict) or _is_state(content):
            break
        found = [name for name in _CONTAINERS if isinstance(content.get(name), dict)]
        if not found:
            break
        if len(found) > 1:
            _logger.warning("%s: '%s' is taken, not '%s'", path, found[0], "', '".join(found[1:]))
        content, place = content[found[0]], f" under '{found[0]}'"
    return content, place


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    )


def _is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not (x.is_meta or x.is_quantized or x.is_nested)


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = [f"{str(key)[:_LONGEST]!r}: {type(value).__name__}" for key, value in content.items()]
    return f"a dict of {len(keys)} ({_some(keys)})"


def to_mmagic(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under mmagic's names; names that are not official stay as they are.

    mmagic reads `{"state_dict": to_mmagic(model.state_dict())}`.
    """
    return {_renamed(name, _MMAGIC_NAMES): x for name, x in state.items()}


def from_mmagic(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under official names; names that are not mmagic's stay as they are."""
    return {_renamed(name, _OFFICIAL_NAMES): x for name, x in state.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names, for a file of any project."""
    state = _unwrapped(state)
    return from_mmagic({n: x for n, x in state.items() if not n.startswith(_IGNORED)})


def _empty_model(state: Mapping[str, Tensor], path: str | os.PathLike[str], **options: Any) -> TTSR:
    """A model on "meta" that fits these tensors, or an error with the reason."""
    _check_sizes(state, path)
    num_res_blocks, n_feats = _sizes(state)
    with torch.device("meta"):
        model = TTSR(
            num_res_blocks,
            n_feats,
            hard_attention=_has(state, r"LTE\.|MainNet\.conv(11|22|33)_head\."),
            csfi=_has(state, r"MainNet\.ex123?\."),
            **options,
        )
    faults = _faults(state, model.state_dict())
    if faults:
        raise ValueError(f"{path} is not a TTSR checkpoint: {faults}")
    return model


def _check_sizes(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse tensors with more values than the file holds, before memory is allocated."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.values()
    }
    sizes = {name: x.numel() * x.element_size() for name, x in state.items()}
    large = [n for n, x in state.items() if sizes[n] > x.untyped_storage().nbytes()]
    if large or sum(sizes.values()) > sum(storages.values()):
        claims = [f"{name} {list(state[name].shape)}" for name in large or sizes]
        raise ValueError(
            f"{path} holds {sum(storages.values())} bytes of tensors, and its shapes need more "
            f"({_some(claims)})"
        )


def _unwrapped(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors without the prefixes of wrappers, of the whole model or of parts."""
    names = [re.sub(_PART_WRAPPERS, "", name) for name in state]
    while True:
        parts = {name.partition(".")[0] for name in names if not name.startswith(_IGNORED)}
        if len(parts) != 1 or not parts <= _WRAPPERS:
            break
        names = [name.removeprefix(f"{min(parts)}.") for name in names]
    if len(set(names)) < len(names):  # two tensors of one name; keep both
        return state
    return dict(zip(names, state.values(), strict=True))


def _halved(name: str, x: Tensor) -> Tensor:
    half = x.half()
    if (half.isinf() & x.isfinite()).any():
        raise ValueError(f"{name} holds {float(x.abs().max()):g}, which is beyond float16")
    return half


def _checked_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path must end in .safetensors, .pt or .pth, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in an existing folder, got {path}")
    return path


def _sizes(state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int]:
    """`num_res_blocks` and `n_feats`; the published ones where tensors are missing."""
    head = state.get("MainNet.SFE.conv_head.weight")
    n_feats = 64 if head is None or head.dim() != 4 else head.shape[0]
    if n_feats < 2 or n_feats % 2:
        n_feats = 64
    blocks = []
    for branches in (r"SFE\.RBs", "RB11", "RB2[12]", "RB3[123]"):
        found = (re.match(rf"MainNet\.{branches}\.(\d+)\.", name) for name in state)
        blocks.append(len({match[1] for match in found if match}))
    return tuple(blocks), n_feats


def _has(state: Mapping[str, Tensor], names: str) -> bool:
    return any(re.match(names, name) for name in state)


def _faults(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Faults of `state` in one line; empty without any."""
    shared = [name for name in expected if name in state]
    kinds = {
        "missing": [name for name in expected if name not in state],
        "superfluous": [name for name in state if name not in expected],
        "of the wrong shape": [
            f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
            for name in shared
            if state[name].shape != expected[name].shape
        ],
        "not floating-point": [name for name in shared if not state[name].is_floating_point()],
    }
    return "; ".join(f"{len(n)} {kind} ({_some(n)})" for kind, n in kinds.items() if n)


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    some = [shown(name[:_LONGEST]) for name in (first, *rest[:2])]
    return ", ".join(some + ["..."] * (len(rest) > 2))
