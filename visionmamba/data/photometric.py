"""SSD's photometric changes (arXiv 1512.02325), drawn for a picture and made in batches.

Made on the device that holds the batch: on the CPU they take longer than all else that happens to a
picture of training.
"""

import torch
from torch import Tensor

_MAX_BRIGHTNESS = 32.0  # of 255
_CONTRAST = (0.5, 1.5)
_SATURATION = (0.5, 1.5)
_MAX_HUE = 36.0  # degrees: 18 steps of OpenCV's 180

UNCHANGED = (0.0, 1.0, 1.0, 0.0, 1.0)
"""Added brightness, contrast before saturation, saturation, hue in degrees, contrast after it."""


def draw_colours() -> tuple[float, ...]:
    """Returns what `UNCHANGED` lists, each changed with probability 1/2; one of the contrasts.

    Random through torch's global generator. torchvision's RandomPhotometricDistort would also
    exchange the channels, which the published segmentation does not.
    """
    brightness, contrast, saturation, hue, contrast_later = UNCHANGED
    comes_first = _chance()
    if _chance():
        brightness = uniform(-_MAX_BRIGHTNESS, _MAX_BRIGHTNESS)
    if _chance():
        factor = uniform(*_CONTRAST)
        contrast, contrast_later = (factor, 1.0) if comes_first else (1.0, factor)
    if _chance():
        saturation = uniform(*_SATURATION)
    if _chance():
        hue = uniform(-_MAX_HUE, _MAX_HUE)
    return brightness, contrast, saturation, hue, contrast_later


def change_colours(images: Tensor, colours: Tensor) -> Tensor:
    """Returns pictures (B, 3, H, W) of 0..255 with their colours changed; float32, not rounded.

    Args:
        images: float32, on any device.
        colours: (B, 5) float32 on the same device, as in `UNCHANGED`.
    """
    brightness, contrast, saturation, hue, contrast_later = (
        one.view(-1, 1, 1, 1) for one in colours.unbind(1)
    )
    images = ((images + brightness).clamp(0, 255) * contrast).clamp(0, 255)
    images = _turn_hues(images, saturation, hue / 60)
    return (images * contrast_later).clamp(0, 255)


def _turn_hues(images: Tensor, saturation: Tensor, sixths: Tensor) -> Tensor:
    """Returns the pictures with another saturation and the hues turned, in the cone of HSV."""
    value, brightest = images.max(1, keepdim=True)
    chroma = value - images.min(1, keepdim=True).values
    # of each channel the next and the one before
    ahead, behind = images.roll(-1, 1), images.roll(1, 1)
    hues = (ahead - behind) / chroma.clamp(min=1e-6)  # gray has no hue, and no chroma to show it
    hue = hues.gather(1, brightest) + 2 * brightest + sixths
    chroma = torch.minimum(chroma * saturation, value)
    places = torch.tensor((5.0, 3.0, 1.0), device=images.device).view(1, 3, 1, 1)
    place = (places + hue).remainder(6)
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def uniform(low: float, high: float) -> float:
    """Returns a number between low and high, drawn from torch's global generator."""
    return float(torch.empty((), dtype=torch.float64).uniform_(low, high))


def _chance() -> bool:
    return uniform(0, 1) < 0.5
