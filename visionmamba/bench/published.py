"""Vim around the published kernels: mamba_ssm's scan and causal_conv1d, for users who have them.

The order of operations and the layout are those of the authors' code: channels before tokens, a
flipped copy for the second direction, each direction gated by itself. Norm, residual stream,
patches and head are this package's.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from visionmamba.models.mixer import BidirectionalMixer, DirectionalSSM
from visionmamba.models.vim import Vim


def use_published_kernels(model: Vim) -> None:
    """Let every mixer of a Vim run on the published kernels, with the weights it has.

    Raises:
        ImportError: mamba_ssm or causal_conv1d is not installed.
    """
    for block in model.blocks:
        assert isinstance(block.mixer, BidirectionalMixer)
        block.mixer = PublishedMixer(block.mixer)


class PublishedMixer(nn.Module):
    """A BidirectionalMixer of kind "ssm+conv" whose scans and convolutions are the published ones.

    Args:
        mixer: holds the weights.
    """

    def __init__(self, mixer: BidirectionalMixer) -> None:
        super().__init__()
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        self.mixer = mixer
        self._convolve = causal_conv1d_fn
        self._scan = selective_scan_fn

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, L, D) for (B, L, D)."""
        xz = self.mixer.in_proj(hidden).transpose(1, 2)  # (B, 2E, L)
        forward, backward = self.mixer.directions
        assert isinstance(forward, DirectionalSSM) and isinstance(backward, DirectionalSSM)
        y = self._read(xz, forward) + self._read(xz.flip(-1), backward).flip(-1)
        out: Tensor = self.mixer.out_proj((y * self.mixer.scale).transpose(1, 2))
        return out

    def _read(self, xz: Tensor, ssm: DirectionalSSM) -> Tensor:
        """Return the gated scan (B, E, L) of one direction."""
        x, z = xz.chunk(2, dim=1)
        u = self._convolve(x, ssm.conv_weight, ssm.conv_bias, activation="silu")
        projected = ssm.x_proj(u.transpose(1, 2))  # (B, L, R + 2N)
        dt_r, B, C = projected.split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
        dt = F.linear(dt_r, ssm.dt_weight.to(dt_r.dtype)).transpose(1, 2)  # (B, E, L)
        y: Tensor = self._scan(
            u,
            dt,
            ssm.A,
            B.transpose(1, 2).contiguous(),
            C.transpose(1, 2).contiguous(),
            ssm.D.float(),
            z=z,
            delta_bias=ssm.dt_bias.float(),
            delta_softplus=True,
        )
        return y
