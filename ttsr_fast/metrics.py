"""PSNR and SSIM by the three protocols of papers on reference-based super-resolution.

Only results of one protocol compare. The formulas are scikit-image's, which is imported when
needed. A protocol defines channels and border.
"""

from typing import Any, NamedTuple

import numpy as np

from ttsr_fast.optional import optional

_RANGE = 255
_SIGMA, _WINDOW = 1.5, 11  # of the Gaussian window (Wang et al., 2004)


class Protocol(NamedTuple):
    """Values that are compared.

    Attributes:
        luma: weights of R, G and B for a weighted sum in [0, 255]; None for the three channels.
        offset: added to that sum. PSNR does not depend on it, SSIM does.
        border: pixels that are left out on every side.
    """

    luma: tuple[float, float, float] | None
    offset: float
    border: int


PROTOCOLS = {
    # utils.py of researchmm/TTSR: BT.601 as fractions of 256, with 16 added for SSIM.
    "ttsr": Protocol((65.738 / 256, 129.057 / 256, 25.064 / 256), 16, 0),
    # PSNR and SSIM of mmagic with crop_border=4, in float64 instead of float32.
    "mmagic": Protocol(None, 0, 4),
    # C2-Matching's validation: bgr2ycbcr of floats, which does not round, then the crop.
    "c2": Protocol((65.481 / 255, 128.553 / 255, 24.966 / 255), 16, 4),
}


def psnr(
    a: np.ndarray,  # [H, W, 3] uint8
    b: np.ndarray,  # [H, W, 3] uint8
    protocol: str = "ttsr",
) -> float:
    """Peak signal-to-noise ratio in dB, of one mean over all that is compared; inf if it is equal.

    Raises:
        TypeError, ValueError: images or a name that does not fit.
        ImportError: scikit-image is not installed.
    """
    return raw_psnr(*_compared(a, b, protocol))


def raw_psnr(x: np.ndarray, y: np.ndarray) -> float:
    """PSNR in dB of values from 0 to 255, as they are; inf for equal ones.

    Raises:
        ImportError: scikit-image is not installed.
    """
    metrics = _metrics()
    with np.errstate(divide="ignore"):
        return float(metrics.peak_signal_noise_ratio(x, y, data_range=_RANGE))


def ssim(
    a: np.ndarray,  # [H, W, 3] uint8
    b: np.ndarray,  # [H, W, 3] uint8
    protocol: str = "ttsr",
) -> float:
    """Structural similarity, the mean over all windows that lie inside, and over channels.

    Windows are 11x11, Gaussian with sigma 1.5; the constants are (0.01 * 255)^2 and (0.03 * 255)^2.

    Raises:
        TypeError, ValueError: images or a name that does not fit, or no room for a window.
        ImportError: scikit-image is not installed.
    """
    metrics, (x, y) = _metrics(), _compared(a, b, protocol)
    return float(
        np.mean(
            [
                metrics.structural_similarity(
                    x[..., channel],
                    y[..., channel],
                    win_size=_WINDOW,
                    gaussian_weights=True,
                    sigma=_SIGMA,
                    use_sample_covariance=False,
                    data_range=_RANGE,
                )
                for channel in range(x.shape[2])
            ]
        )
    )


def check_installed() -> None:
    """Raise ImportError if scikit-image is missing."""
    _metrics()


def check_size(height: int, width: int, protocol: str) -> None:
    """Raise ValueError for images without room for a window."""
    least = _WINDOW + 2 * check_protocol(protocol).border
    if min(height, width) < least:
        raise ValueError(
            f"images must be at least {least}x{least} pixels for protocol {protocol!r}, "
            f"got {width}x{height}"
        )


def check_protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {tuple(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


def _compared(a: np.ndarray, b: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of both for the protocol, `[H, W, 1 or 3]` float64."""
    protocol = check_protocol(name)
    for x in (a, b):
        if not isinstance(x, np.ndarray) or x.dtype != np.uint8:
            kind = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"images must be arrays of uint8, got {kind}")
    if a.shape != b.shape or a.ndim != 3 or a.shape[2] != 3:
        raise ValueError(
            f"images must be two [H, W, 3] of one size, got {list(a.shape)} and {list(b.shape)}"
        )
    check_size(a.shape[0], a.shape[1], name)
    return _prepared(a, protocol), _prepared(b, protocol)


def _prepared(pixels: np.ndarray, protocol: Protocol) -> np.ndarray:
    rows, columns = (slice(protocol.border, n - protocol.border) for n in pixels.shape[:2])
    x = pixels[rows, columns].astype(np.float64)
    return x if protocol.luma is None else x @ np.array(protocol.luma)[:, None] + protocol.offset


def _metrics() -> Any:
    message = "PSNR and SSIM need scikit-image: pip install scikit-image"
    return optional("skimage.metrics", message)
