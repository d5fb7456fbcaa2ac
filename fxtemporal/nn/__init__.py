"""Layers for people who write models with a time axis.

:class:`TimeDistributed` runs any module on every frame, in one call::

    frames = TimeDistributed(resnet18())        # (B, T, 3, H, W) -> (B, T, 1000)
    out = frames(clip)                          # resnet18 sees (B·T, 3, H, W) once

:class:`Conv2Plus1d` is the (2+1)D convolution: one over space, then one over time, which replace a
3-D convolution. Built from an existing 3-D convolution, it is the best approximation of a given
rank; at full rank it is exact::

    Conv2Plus1d.from_conv3d(conv, rank=0.5)
"""

from fxtemporal.nn.conv2plus1d import Conv2Plus1d, paper_rank
from fxtemporal.nn.time_distributed import TimeDistributed

__all__ = ["Conv2Plus1d", "TimeDistributed", "paper_rank"]
