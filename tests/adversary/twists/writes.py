"""Aliasing and writes in place: through views, into inputs, into what was kept."""

from ..draft import Draft
from .base import Twist, into

TWISTS: list[Twist] = []
twist = into(TWISTS)


@twist
def write_through_alias(draft: Draft) -> bool:
    """A write through another name of the same storage, and a read of the first."""
    view = draft.rng.choice(
        (
            "f",
            "f.view_as(f)",
            "f[:]",
            "f.detach()",
            "f.flatten(1)",
            "f.contiguous()",
            "f.reshape(f.shape)",
            "f.expand_as(f)",
            "F.dropout(f, 0.5, False)",
            "+f",
            "f.to(f.dtype)",
            "f.float()",
            "f.squeeze(-1)",
            "torch.Tensor.positive(f)",
            "f.real",
            "f.type_as(f)",
            "f.clone()",
            "nn.Identity()(f)",
            "f.data",
            "torch.atleast_2d(f)",
            "f.nan_to_num()",
            "f.unbind(1)[0]",
            "f.split(1, 0)[0]",
            "f.T if f.dim() == 2 else f",
            "nn.Dropout2d().eval()(f)",
            "f.requires_grad_(f.requires_grad)",
            "f.broadcast_to(f.shape)",
            "f.movedim(0, -1)",
            "torch.asarray(f)",
            "f.narrow(0, 0, 1)",
            "f.unfold(-1, 1, 1)",
            "f.diagonal()",
            "f.resolve_conj()",
            "f.chunk(2, -1)[0]",
            "f.cpu()",
            "f.view(f.shape)",
            "f.swapaxes(0, -1)",
        )
    )
    write = draft.rng.choice(
        (
            "a.mul_(2)",
            "a.add_(1)",
            "a.relu_()",
            "a += 1",
            "a[0] = 0",
            "a.zero_()",
            "F.relu(a, inplace=True)",
            "a.fill_(0.3)",
            "a.clamp_(min=0)",
            "a.copy_(a.flip(0))",
            "a[..., 0] *= 3",
            "torch.relu_(a)",
            "a.sub_(a.mean())",
            "torch.add(a, 1, out=a)",
        )
    )
    draft.scope["f"] = draft.get("f").clone()
    if draft.chance(0.5):
        return draft.say("body", f"b = f * 2\na = {view}\n{write}\nf = f + b")
    return draft.say("body", f"a = {view}\nb = f\n{write}\nf = b + 0.5 * f")


@twist
def write_into_input(draft: Draft) -> bool:
    """The caller's tensor is written."""
    text = draft.rng.choice(
        (
            "x[:, t] = 0",
            "x[:, t] *= 2",
            "x.select(1, t).mul_(0.5)",
            "x.mul_(0.9)",
            "x[0] += 1",
            "x[:, t].relu_()",
            "x[:, 0] = x[:, t]",
            "x[..., 0] = t",
        )
    )
    part = draft.rng.choice(("body", "body", "before", "after"))
    draft.scope["x"] = draft.get("x").clone()
    if part != "body":
        text = text.replace("t]", "-1]").replace("= t", "= 1").replace("1, t", "1, -1")
    return draft.say(part, text)


@twist
def copy_of_input(draft: Draft) -> bool:
    """A clone is written frame by frame, and read."""
    draft.write(
        "before", draft.rng.choice(("w = x.clone()", "w = x * 1", "w = torch.zeros_like(x)"))
    )
    draft.scope["w"] = draft.get("x").clone()
    text = draft.rng.choice(
        (
            "w[:, t] = w[:, t] * 2\nf = f + w[:, t].mean()",
            "w[:, t].mul_(0.5)\nf = f + w.mean()",
            "w[:, :t] = 0\nf = f + w[:, t].sum()",
            "w[:, t] = x[:, t] + w[:, t - 1]\nf = f * w[:, t].mean()",
            "f = f + w[:, t - 1].mean()\nw[:, t] += 1",
            "w = w * 0.9\nf = f + w[:, t].mean()",
        )
    )
    return draft.say("body", text)


@twist
def kept_then_written(draft: Draft) -> bool:
    """A kept result is written after it was kept."""
    draft.say("before", "kept = []")
    return draft.say(
        "body",
        draft.rng.choice(
            (
                "f = f * 1\nkept.append(f)\nf.relu_()",
                "f = f * 1\nkept.append(f)\nf = f.add_(1) + kept[0].mean()",
                "kept.append(f * 1)\nkept[-1].mul_(2)\nf = kept[-1]",
                "kept.append(f * 1)\nkept[0] += 1\nf = kept[0] + f",
                "f = f.unsqueeze(1) * 1\nf.relu_()",
                "f = f + 0\nf[:, 0] = 0",
                "f = f + 0\nf[f < 0] = 0.5",
                "f = f + 0\nf[0].fill_(1)",
                "f = f.clone()\nf.index_fill_(-1, torch.tensor([0]), 0.5)",
                "f = f * 1\nf.masked_fill_(f > 1, 1.0)",
                "f = f * 1\nf.t_() if f.dim() == 2 else f",
                "f = f * 1\nf.unsqueeze_(0)\nf.squeeze_(0)",
                "f = f * 1\nf.data.mul_(2)",
                "f = f * 1\ntorch.nn.init.constant_(f, 0.1)",
                "f = f * 1\nf.resize_(f.shape)",
                "buf = torch.empty_like(f)\ntorch.mul(f, 2, out=buf)\nf = buf",
                "f = f * 1\nf.requires_grad_(False) if not f.requires_grad else f",
            )
        ),
    )
