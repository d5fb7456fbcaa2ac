"""MONAI's networks on small volumes, and its 2-D networks over the slices of a volume."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._torchvision import torchvision_models
from benchmarks.zoo.case import Built, ZooCase
from benchmarks.zoo.frames import CarriedMask, StackedMaps
from benchmarks.zoo.weights import settled

__all__ = ["CASES"]

PACKAGE = "monai"
DEPTH = 2  # the slices of a volume (B, C, D, H, W)

_SMALL = (1, 1, 16, 32, 32)
_CUBE = (1, 1, 32, 32, 32)
_UNET: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
_VIT: dict[str, Any] = {
    "in_channels": 1,
    "img_size": (16, 32, 32),
    "patch_size": (8, 8, 8),
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_layers": 2,
    "num_heads": 4,
}
_DIFFUSION: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "num_res_blocks": 1,
    "channels": (8, 16, 16),
    "attention_levels": (False, False, True),
    "norm_num_groups": 4,
}


def _network(name: str, *args: Any, **config: Any) -> nn.Module:
    """A class or a builder of ``monai.networks.nets``, called."""
    torchvision_models()  # MONAI imports torchvision where it can
    network: nn.Module = getattr(importlib.import_module("monai.networks.nets"), name)(
        *args, **config
    )
    return network


def _case(
    name: str,
    *shapes: tuple[int, ...],
    label: str | None = None,
    method: str | None = None,
    frames: int = DEPTH,
    settle: bool = False,
    **config: Any,
) -> ZooCase:
    """The class ``name``, called with random tensors of these shapes."""

    def build() -> Built:
        inputs = tuple(torch.randn(shape) for shape in shapes)
        network = _network(name, **config)
        return settled(network, *inputs) if settle else Built(network.eval(), inputs)

    return ZooCase(PACKAGE, label or name, build, method=method, frames=frames)


class NeighbourSlices(nn.Module):
    """2.5-D segmentation: each slice is segmented from itself and its two neighbours."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, volume: Tensor) -> Tensor:
        padded = nn.functional.pad(volume, (0, 0, 0, 0, 1, 1))
        masks = [self.network(padded[:, 0, depth : depth + 3]) for depth in range(volume.shape[2])]
        return torch.stack(masks, dim=2)


def _slice_by_slice() -> Built:
    network = _network("UNet", spatial_dims=2, in_channels=1, out_channels=2, **_UNET)
    return Built(StackedMaps(network, DEPTH).eval(), (torch.randn(2, 1, 8, 32, 32),))


def _flexible_unet_slices() -> Built:
    network = _network(
        "FlexibleUNet",
        in_channels=1,
        out_channels=2,
        backbone="efficientnet-b0",
        decoder_channels=(32, 24, 16, 16, 8),
    )
    return Built(StackedMaps(network, DEPTH).eval(), (torch.randn(1, 1, 6, 64, 64),))


def _neighbour_slices() -> Built:
    network = _network(
        "SegResNet",
        spatial_dims=2,
        in_channels=3,
        out_channels=2,
        init_filters=8,
        blocks_down=(1, 1, 2),
        blocks_up=(1, 1),
    )
    return Built(NeighbourSlices(network).eval(), (torch.randn(2, 1, 8, 32, 32),))


def _propagated_mask() -> Built:
    network = _network("AttentionUnet", spatial_dims=2, in_channels=2, out_channels=1, **_UNET)
    return Built(CarriedMask(network, DEPTH).eval(), (torch.randn(2, 1, 6, 32, 32),))


def _bag_of_slices() -> Built:
    network = _network(
        "ResNet",
        "basic",
        [1, 1, 1, 1],
        [8, 16, 32, 64],
        spatial_dims=2,
        n_input_channels=3,
        feed_forward=False,
    )
    model = _network(
        "MILModel",
        num_classes=3,
        mil_mode="att_trans",
        pretrained=False,
        backbone=network,
        backbone_num_features=64,
        trans_blocks=1,
    )
    return Built(model.eval(), (torch.randn(2, 6, 3, 32, 32),))


def _vista3d() -> Built:
    modules = importlib.import_module("monai.networks.nets.vista3d")
    size, classes = 8, 16
    encoder = _network(
        "SegResNetDS2",
        in_channels=1,
        out_channels=size,
        init_filters=size,
        blocks_down=(1, 1, 2),
        norm="instance",
    )
    points = modules.PointMappingSAM(feature_size=size, n_classes=classes, last_supported=8)
    mapping = modules.ClassMappingClassify(n_classes=classes, feature_size=size, use_mlp=True)
    model = modules.VISTA3D(image_encoder=encoder, class_head=mapping, point_head=points)
    prompt = {"class_vector": torch.tensor([[1], [3]])}
    return Built(model.eval(), (torch.randn(_SMALL),), prompt)


def _nonzero(name: str, **config: Any) -> nn.Module:
    """The network with random weights in the convolutions that start at zero."""
    network = _network(name, **config)
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def _diffusion_model_unet() -> Built:
    model = _nonzero("DiffusionModelUNet", out_channels=1, num_head_channels=8, **_DIFFUSION)
    return Built(model.eval(), (torch.randn(_SMALL),), {"timesteps": torch.tensor([7])})


def _spade_diffusion_model_unet() -> Built:
    model = _nonzero(
        "SPADEDiffusionModelUNet",
        out_channels=1,
        label_nc=3,
        num_head_channels=8,
        spade_intermediate_channels=8,
        **_DIFFUSION,
    )
    labels = torch.randn(1, 3, *_SMALL[2:])
    conditions = {"timesteps": torch.tensor([7]), "seg": labels}
    return Built(model.eval(), (torch.randn(_SMALL),), conditions)


def _control_net() -> Built:
    model = _nonzero(
        "ControlNet",
        num_head_channels=8,
        conditioning_embedding_num_channels=(8,),
        **_DIFFUSION,
    )
    conditions = {"timesteps": torch.tensor([7]), "controlnet_cond": torch.randn(_SMALL)}
    return Built(model.eval(), (torch.randn(_SMALL),), conditions)


def _voxel_morph() -> Built:
    backbone = _network(
        "VoxelMorphUNet",
        spatial_dims=3,
        in_channels=2,
        unet_out_channels=8,
        channels=(8, 8, 16, 16, 16, 16),
        final_conv_channels=(8, 8),
    )
    model = _network("VoxelMorph", backbone=backbone, integration_steps=3)
    return Built(model.eval(), (torch.randn(_SMALL), torch.randn(_SMALL)))


_SEGMENTATION: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
_AUTOENCODER: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "num_res_blocks": 1,
    "channels": (8, 16, 16),
    "attention_levels": (False, False, True),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "spatial_dims": 3,
}

CASES: tuple[ZooCase, ...] = (
    _case("UNet", _SMALL, num_res_units=2, **_SEGMENTATION, **_UNET),
    _case("BasicUNet", _SMALL, features=(8, 8, 16, 16, 32, 8), **_SEGMENTATION),
    _case("BasicUNetPlusPlus", _SMALL, features=(4, 4, 8, 8, 16, 4), **_SEGMENTATION),
    _case(
        "DynUNet",
        _SMALL,
        kernel_size=[(1, 3, 3), 3, 3],
        strides=[1, (1, 2, 2), 2],
        upsample_kernel_size=[(1, 2, 2), 2],
        filters=[8, 16, 32],
        res_block=True,
        **_SEGMENTATION,
    ),
    _case(
        "SegResNet",
        _SMALL,
        init_filters=8,
        blocks_down=(1, 1, 2),
        blocks_up=(1, 1),
        **_SEGMENTATION,
    ),
    _case("SegResNetDS", _SMALL, init_filters=8, blocks_down=(1, 1, 2), dsdepth=2, **_SEGMENTATION),
    _case(
        "SegResNetVAE",
        _SMALL,
        input_image_size=_SMALL[2:],
        vae_nz=8,
        init_filters=8,
        blocks_down=(1, 1, 2),
        blocks_up=(1, 1),
        **_SEGMENTATION,
    ),
    _case("VNet", (1, 1, 16, 16, 16), in_channels=1, out_channels=2),
    _case(
        "UNETR",
        (1, 1, 16, 32, 32),
        in_channels=1,
        out_channels=2,
        img_size=(16, 32, 32),
        feature_size=8,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
    ),
    _case(
        "SwinUNETR",
        (1, 1, 32, 64, 64),
        in_channels=1,
        out_channels=2,
        depths=(2, 2, 1, 1),
        num_heads=(2, 2, 4, 4),
        window_size=(2, 4, 4),
        feature_size=12,
    ),
    _case(
        "SwinUNETR",
        (1, 1, 64, 32, 64),
        label="SwinUNETRv2",
        in_channels=1,
        out_channels=2,
        depths=(2, 1, 1, 1),
        num_heads=(2, 2, 4, 4),
        window_size=4,
        feature_size=12,
        use_v2=True,
    ),
    _case("AttentionUnet", _SMALL, **_SEGMENTATION, **_UNET),
    _case(
        "HighResNet",
        _SMALL,
        layer_params=(
            {"name": "conv_0", "n_features": 8, "kernel_size": 3},
            {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 2},
            {"name": "res_2", "n_features": 16, "kernels": (3, 3), "repeat": 2},
            {"name": "conv_1", "n_features": 16, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1},
        ),
        **_SEGMENTATION,
    ),
    _case(
        "MedNeXt",
        _SMALL,
        init_filters=8,
        kernel_size=3,
        blocks_down=(1, 1, 1, 1),
        blocks_bottleneck=1,
        blocks_up=(1, 1, 1, 1),
        **_SEGMENTATION,
    ),
    _case(
        "AHNet",
        (1, 1, 32, 64, 64),
        settle=True,
        layers=(1, 1, 1, 1),
        psp_block_num=2,
        out_channels=2,
    ),
    _case(
        "DenseNet121",
        _CUBE,
        init_features=8,
        growth_rate=4,
        **_SEGMENTATION,
    ),
    _case(
        "ResNet",
        _SMALL,
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=[8, 16, 32, 64],
        n_input_channels=1,
        conv1_t_stride=2,
        num_classes=5,
    ),
    _case(
        "SEResNet50",
        _SMALL,
        layers=(1, 1, 1, 1),
        spatial_dims=3,
        in_channels=1,
        num_classes=5,
    ),
    _case(
        "EfficientNetBN",
        (1, 1, 32, 64, 64),
        settle=True,
        model_name="efficientnet-b0",
        pretrained=False,
        spatial_dims=3,
        in_channels=1,
        num_classes=5,
    ),
    _case(
        "AutoEncoder",
        _SMALL,
        channels=(8, 16, 32),
        strides=(2, 2, 2),
        num_res_units=1,
        inter_channels=[16],
        **_SEGMENTATION,
    ),
    _case(
        "VarAutoEncoder",
        _SMALL,
        spatial_dims=3,
        in_shape=_SMALL[1:],
        out_channels=1,
        latent_size=4,
        use_mean_at_inference=True,
        channels=(8, 16),
        strides=(2, 2),
    ),
    _case("ViT", _SMALL, classification=True, num_classes=5, **_VIT),
    _case("ViTAutoEnc", _SMALL, **(_VIT | {"patch_size": (4, 4, 4)})),
    _case(
        "VQVAE",
        _SMALL,
        in_channels=1,
        out_channels=1,
        spatial_dims=3,
        channels=(8, 16),
        num_res_layers=1,
        num_res_channels=(8, 16),
        downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
        upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
        num_embeddings=16,
        embedding_dim=8,
    ),
    _case("AutoencoderKL", _SMALL, method="reconstruct", **_AUTOENCODER),
    _case(
        "SPADEAutoencoderKL",
        _SMALL,
        (1, 3, *_SMALL[2:]),
        method="reconstruct",
        label_nc=3,
        spade_intermediate_channels=8,
        **_AUTOENCODER,
    ),
    _case(
        "SPADENet",
        (1, 3, *_SMALL[2:]),
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        label_nc=3,
        input_shape=_SMALL[2:],
        channels=[16, 16, 8],
        is_vae=False,
        spade_intermediate_channels=8,
    ),
    _case("PatchDiscriminator", _CUBE, spatial_dims=3, channels=8, in_channels=1, num_layers_d=2),
    _case(
        "RegUNet",
        (1, 2, *_SMALL[2:]),
        spatial_dims=3,
        in_channels=2,
        num_channel_initial=8,
        depth=2,
    ),
    _case(
        "LocalNet",
        (1, 2, *_SMALL[2:]),
        spatial_dims=3,
        in_channels=2,
        num_channel_initial=8,
        extract_levels=(0, 1, 2),
    ),
    _case(
        "Classifier",
        (1, 1, 16, 32, 32),
        in_shape=(1, 16, 32, 32),
        classes=5,
        channels=(8, 16, 32),
        strides=(2, 2, 2),
    ),
    _case("DAF3D", (1, 1, 32, 32, 32), in_channels=1, out_channels=2),
    ZooCase(PACKAGE, "VoxelMorph", _voxel_morph),
    ZooCase(PACKAGE, "VISTA3D", _vista3d),
    ZooCase(PACKAGE, "DiffusionModelUNet", _diffusion_model_unet),
    ZooCase(PACKAGE, "SPADEDiffusionModelUNet", _spade_diffusion_model_unet),
    ZooCase(PACKAGE, "ControlNet", _control_net),
    ZooCase(PACKAGE, "MILModel", _bag_of_slices, frames=1),
    ZooCase(PACKAGE, "UNetSliceBySlice", _slice_by_slice),
    ZooCase(PACKAGE, "FlexibleUNetSliceBySlice", _flexible_unet_slices),
    ZooCase(PACKAGE, "SegResNetNeighbourSlices", _neighbour_slices),
    ZooCase(PACKAGE, "AttentionUnetPropagatedMask", _propagated_mask),
)
