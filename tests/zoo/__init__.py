"""A zoo of small awkward models, each for one thing that can go wrong.

Every model is an :class:`Awkward`: ``Model.build()`` gives it seeded, in the mode it is meant for,
and ``model.example(batch, frames)`` gives seeded inputs for it, (B, T, 3, 8, 8) unless it says
otherwise. The tuples below sort them by what should become of them.
"""

from __future__ import annotations

from .across_the_batch import (
    BatchMeanBody,
    BatchSoftmaxBody,
    BatchTransposedBody,
    FrameMaximumBody,
    PairwiseBody,
)
from .base import FEATURES as FEATURES
from .base import Awkward as Awkward
from .base import WithBody as WithBody
from .base import body as body
from .base import double as double
from .base import noise as noise
from .bodies import (
    CNNLSTM,
    BatchedContext,
    ConvThenRecurrence,
    FrameDifference,
    FunctionalBody,
    InplaceBody,
    MeanOverFrames,
    MethodBody,
    NormalizedBody,
    OneFrameElsewhere,
    PositionPerFrame,
    RecurrenceBetween,
    ResidualBody,
    TwoClipsOneBody,
    TwoLoops,
    TwoStreams,
    ViewByBatch,
    ViewByFeatures,
    ViewByFrameBatch,
    WritesReturnedMap,
    WritesTotal,
)
from .hard_to_capture import (
    AssignsFrames,
    DataDependentBranch,
    NestedInputs,
    NoGradPart,
    OptionalArgument,
    ShapeBranch,
    TypeCheck,
)
from .must_stay import (
    AlwaysDropout,
    BatchStatisticsBody,
    ConvolutionalRecurrence,
    EvalDropout,
    FirstFrameApart,
    HardCodedView,
    HookedBody,
    ModulePerFrame,
    OnlyMovesData,
    ParametrizedBody,
    PureRecurrence,
    SpectralNormBody,
    StepAsNumber,
    TrainingBatchNorm,
    TrainingDropout,
    WritesItsInput,
)
from .no_loop import (
    AliasedConv3d,
    AlreadyFolded,
    CausalConv3d,
    DenseConv3d,
    FunctionalConv3d,
    GroupedConv3d,
    HookedConv3d,
    PaddedConv3d,
    ParametrizedConv3d,
    PatchConv3d,
    ResidualConv3d,
    SharedConv3d,
    SubclassedConv3d,
    TiedConv3d,
    UnbatchedConv3d,
    WholeClipKernel,
)
from .no_loop import ScaledConv3d as ScaledConv3d
from .spellings import (
    ChannelsFirstFrames,
    ChunkedFrames,
    ColonFrames,
    ConcatenatedBatch,
    ConcatenatedFeatures,
    ConcatenatedFrames,
    ConstantFrames,
    EllipsisFrames,
    FunctionUnboundFrames,
    IndexedByNone,
    IndexedFrames,
    IndexSelectedFrames,
    LastFrameOnly,
    ListOfFrames,
    NarrowedFrames,
    NegativeFrames,
    ReversedFrames,
    SelectedFrames,
    SlicedFrames,
    SplitFrames,
    StackedFirst,
    StackedLast,
    SubsampledFrames,
    TimeMajor,
    UnbatchedFrames,
    UnboundFrames,
    UnsqueezedFrames,
)
from .wrong import ClipIntoConv2d, MapsIntoLSTM

SPELLINGS: tuple[type[Awkward], ...] = (
    IndexedFrames,
    EllipsisFrames,
    ColonFrames,
    SelectedFrames,
    NegativeFrames,
    UnboundFrames,
    FunctionUnboundFrames,
    SplitFrames,
    ChunkedFrames,
    SlicedFrames,
    NarrowedFrames,
    IndexSelectedFrames,
    ChannelsFirstFrames,
    ConstantFrames,
    SubsampledFrames,
    ReversedFrames,
    StackedFirst,
    StackedLast,
    ConcatenatedFrames,
    IndexedByNone,
    ConcatenatedFeatures,
    ConcatenatedBatch,
    ListOfFrames,
    TimeMajor,
    UnbatchedFrames,
    UnsqueezedFrames,
)
"""One loop in every spelling: all of them fold."""

BODIES: tuple[type[Awkward], ...] = (
    WritesReturnedMap,
    WritesTotal,
    InplaceBody,
    ResidualBody,
    FunctionalBody,
    MethodBody,
    ViewByBatch,
    ViewByFrameBatch,
    ViewByFeatures,
    OneFrameElsewhere,
    TwoLoops,
    TwoStreams,
    TwoClipsOneBody,
    BatchedContext,
    PositionPerFrame,
    FrameDifference,
    MeanOverFrames,
    EvalDropout,
    NormalizedBody,
    ConvThenRecurrence,
    RecurrenceBetween,
    CNNLSTM,
)
"""Bodies that fold, in whole or in the part that computes most."""

ACROSS_THE_BATCH: tuple[type[Awkward], ...] = (
    BatchMeanBody,
    FrameMaximumBody,
    BatchSoftmaxBody,
    BatchTransposedBody,
    PairwiseBody,
)
"""Bodies in which the clips of a batch meet: folding is wrong; refuse it, or batch by vmap."""

BLOCKED: tuple[type[Awkward], ...] = (
    HardCodedView,
    ModulePerFrame,
    PureRecurrence,
    ConvolutionalRecurrence,
    TrainingBatchNorm,
    BatchStatisticsBody,
    TrainingDropout,
    AlwaysDropout,
    WritesItsInput,
    StepAsNumber,
    FirstFrameApart,
    HookedBody,
    ParametrizedBody,
    SpectralNormBody,
    OnlyMovesData,
)
"""Loops that must give their ``blocker`` as a reason, and the original's numbers."""

CONV3D: tuple[type[Awkward], ...] = (
    ResidualConv3d,
    DenseConv3d,
    GroupedConv3d,
    PaddedConv3d,
    PatchConv3d,
    CausalConv3d,
    FunctionalConv3d,
    UnbatchedConv3d,
    WholeClipKernel,
    SubclassedConv3d,
    SharedConv3d,
    TiedConv3d,
    AliasedConv3d,
    ParametrizedConv3d,
    HookedConv3d,
)
"""Conv3d layers, replaceable or not: the numbers must stay."""

CAPTURE: tuple[type[Awkward], ...] = (
    AlreadyFolded,
    LastFrameOnly,
    OptionalArgument,
    NoGradPart,
    DataDependentBranch,
    ShapeBranch,
    TypeCheck,
    AssignsFrames,
    NestedInputs,
)
"""Models that are hard to capture, or that leave nothing to do."""

BROKEN: tuple[type[Awkward], ...] = (ClipIntoConv2d, MapsIntoLSTM)
"""Models that raise ``fails`` by themselves; the error should say what is wrong with them."""

ZOO = SPELLINGS + BODIES + ACROSS_THE_BATCH + BLOCKED + CONV3D + CAPTURE
"""Every model that runs."""
