"""Base classes of torch's layers. Needed: a family of layers is told by them."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["BatchNorm", "Conv", "Dropout", "Norm", "conv_forward"]

BatchNorm = nn.modules.batchnorm._BatchNorm
Norm = nn.modules.batchnorm._NormBase
"""Of BatchNorm and InstanceNorm."""
Dropout = nn.modules.dropout._DropoutNd
Conv = nn.modules.conv._ConvNd


def conv_forward(layer: type[Conv]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The two functions that a convolution computes with; a subclass may replace either."""
    return layer.forward, layer._conv_forward
