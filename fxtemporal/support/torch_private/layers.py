"""Base classes of torch's layers. Required: they identify a family of layers."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["BatchNorm", "Conv", "Dropout", "Norm", "conv_forward"]

BatchNorm = nn.modules.batchnorm._BatchNorm
Norm = nn.modules.batchnorm._NormBase
"""The base class of BatchNorm and InstanceNorm."""
Dropout = nn.modules.dropout._DropoutNd
Conv = nn.modules.conv._ConvNd


def conv_forward(layer: type[Conv]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The two methods in which a convolution computes; a subclass may replace either."""
    return layer.forward, layer._conv_forward
