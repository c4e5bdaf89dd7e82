"""Vision Mamba: bidirectional selective state-space vision backbones."""

__version__ = "0.1.0"
