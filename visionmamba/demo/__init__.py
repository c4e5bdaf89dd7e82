"""The demonstration behind `make demo`: Vim and DeiT learn real images, side by side."""

from visionmamba.demo.run import Demo

__all__ = ["Demo"]
