"""Makes the first state: the captured program, and the verifier that compares results."""

from __future__ import annotations

from torch import Tensor

from fxtemporal.analysis.cost import Costs
from fxtemporal.capture.capture import capture
from fxtemporal.capture.failures import raise_if_model_fails
from fxtemporal.compiler.state import Request, State
from fxtemporal.mistakes import telling_cure
from fxtemporal.passes.dump import Dump
from fxtemporal.support.errors import CaptureError, VerificationError
from fxtemporal.support.torch_private import pytree
from fxtemporal.verification.comparison import Comparison
from fxtemporal.verification.verifier import Verifier

__all__ = ["begin", "check_capture"]


def begin(request: Request) -> State:
    """Capture the model, and return the state before the first stage.

    Raises:
        CaptureError: the model cannot be captured, or its doubtful graph cannot be checked.
        VerificationError: a doubtful graph computes something else than the model.
    """
    promises = request.promises
    captured = request.captured
    if captured is None:
        with telling_cure():
            captured = capture(request.model, *(request.example or (None, None)))
    Dump(request.original)("captured", captured)  # a report of a failure behind this needs it
    if captured.doubt is not None and not request.verify:
        raise CaptureError(
            f"{captured.doubt}: only a comparison with the model can tell whether its graph is "
            "right. Give example inputs, and leave verify on."
        )
    keeping = [
        rule.keeping(confined=promises.confined, bitwise=promises.bitwise) for rule in request.rules
    ]
    costs = None if request.example is None else Costs()
    blocks = () if costs is None else costs.blocks(captured)
    state = State(request, captured, tuple(keeping), costs=costs, blocks=blocks)
    if request.verify:
        _refuse_meta_tensors(request)
        state = state.but(verifier=_verifier(request))
    state = state.with_captured(captured)
    if captured.doubt is not None:
        _refuse_unless_equal(state.compared(captured.gm))
        _refuse_other_numbers_with_gradients(state)
    return state.but(races=request.races())


def _verifier(request: Request) -> Verifier:
    """The verifier, which runs the model: that may fail although a trace, without data, did not."""
    try:
        return request.verifier(request.original)
    except Exception as error:  # whatever the model raises
        failed = error
    assert request.example is not None
    with telling_cure():
        raise_if_model_fails(request.original, request.example)
    raise failed


def check_capture(state: State) -> State:
    """Compare the captured graph with the model; if it differs, capture with torch.export."""
    comparison = state.compared(state.captured.gm)
    if comparison is not None and not comparison.equal and state.captured.frontend == "fx":
        request = state.request
        assert request.example is not None
        again = capture(request.model, *request.example, frontend="export")
        state = state.with_captured(again)
        comparison = state.compared(state.captured.gm)
    _refuse_unless_equal(comparison)
    return state


def _refuse_meta_tensors(request: Request) -> None:
    inputs = [leaf for leaf in pytree.tree_leaves(request.example) if isinstance(leaf, Tensor)]
    if any(t.is_meta for t in (*request.original.parameters(), *inputs)):
        raise CaptureError(
            "the model or its example inputs are on the meta device and hold no numbers: there "
            "is nothing to verify. Load the weights first, or ask fxtemporal.audit"
        )


def _refuse_unless_equal(comparison: Comparison | None) -> None:
    if comparison is not None and not comparison.equal:
        bad = next(sample for sample in comparison.samples if not sample.equal)
        what = bad.problem or f"relative error {bad.relative_error:.1e}"
        raise VerificationError(
            f"the captured graph is not the model: on {bad.inputs}, {what}. The forward may "
            "depend on something outside its inputs and parameters (random numbers, a counter, "
            "a global): make it an input, or call optimize on the part that does not."
        )


def _refuse_other_numbers_with_gradients(state: State) -> None:
    """Refuse a graph that differs from the model on inputs for which gradients are asked.

    A forward may compute something else with gradients than without; a graph holds only one.
    """
    example, original = state.request.example, state.request.original
    assert example is not None
    for inputs in (example, pytree.tree_map_only(Tensor, _asking, example)):
        try:
            verifier = Verifier(original, inputs, gradients=True)
        except Exception:  # the model may not take gradients, in any way
            continue
        if not verifier.compare(state.captured.gm).equal:
            raise VerificationError(
                f"{state.captured.doubt}, and computes something else where gradients are asked "
                "for: a graph is one of the two. Decide on self.training, or on an argument of "
                "the forward."
            )


def _asking(tensor: Tensor) -> Tensor:
    """``tensor`` as an input that requires gradients, if its dtype is floating-point."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
