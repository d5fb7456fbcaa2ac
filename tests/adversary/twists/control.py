"""Control by t: branches, numbers, parameters and early ends that depend on the frame or a size."""

from ..draft import Draft
from .base import Twist, into, pick

TWISTS: list[Twist] = []
twist = into(TWISTS)


@twist
def branch_on_t(draft: Draft) -> bool:
    """A branch on the number of the frame."""
    test = draft.rng.choice(
        (
            "t % 2",
            "t >= 5",
            "t == 0",
            "t > 2",
            "t < 1",
            "t >= 40",
            "t and t % 3 == 0",
            "t in (1, 3)",
            "t == SIZE - 1",
            "t > SIZE // 2",
            "bool(t)",
            "t * t > 30",
            "self.training and t",
        )
    )
    does = draft.rng.choice(("f = f * 2", "f = f.relu()", "f = f + t", "f = -f", "f = f.detach()"))
    draft.write("body", f"if {test}:\n    {does}")
    return True


@twist
def number_from_t(draft: Draft) -> bool:
    """A number that is computed from t."""
    return pick(
        draft,
        "body",
        "f = f * t",
        "f = f + 0.1 * t",
        "f = f / (t + 1)",
        "f = f * 0.9 ** t",
        "f = f * math.sin(t)",
        "f = f * float(t > 3)",
        "f = f + min(t, 3)",
        "f = f * (2 if t % 2 else 1)",
        "f = f * [1.0, 2.0, 0.5][t % 3]",
        "f = f * ([1.0] * 40 + [0.5] * 100)[t]",
        "f = f + torch.tensor(float(t))",
        "f = f + torch.full_like(f, t)",
        "f = f.roll(t, -1)",
        "f = f * (1 << min(t, 4))",
        "f = f + int(f'{t}')",
    )


@twist
def parameter_by_t(draft: Draft) -> bool:
    """A parameter or a module of each frame."""
    value = draft.get("f")
    size = value.shape[-1] if value.dim() > 1 else 1
    if not draft.say("init", f"self.pos = nn.Parameter(torch.randn(100, {size}))"):
        return False
    row = draft.rng.choice(("t", "t", "min(t, 3)", "t % 2", "t // 2", "-1 - t", "99 - t", "t * 2"))
    if draft.chance(0.2) and value.dim() > 1:
        draft.say(
            "init", f"self.many = nn.ModuleList([nn.Linear({size}, {size}) for _ in range(8)])"
        )
        return draft.say("body", f"f = self.many[{row}](f)")
    return draft.say("body", f"f = f + self.pos[{row}]")


@twist
def leave_early(draft: Draft) -> bool:
    """break and continue."""
    test = draft.rng.choice(("t == 3", "t > 4", "t >= 40", "t == 2"))
    word = draft.rng.choice(("break", "continue", "break"))
    draft.write("body", f"if {test}:\n    {word}")
    return True


@twist
def branch_on_values(draft: Draft) -> bool:
    """A branch on what a tensor holds."""
    test = draft.rng.choice(
        ("f.sum() > 0", "f.mean().item() > 0", "f.isnan().any()", "f.max() > 50")
    )
    draft.write("body", f"if {test}:\n    f = f * 0.5")
    return True


@twist
def branch_on_shape(draft: Draft) -> bool:
    """A branch on a size, the batch's among them."""
    test = draft.rng.choice(
        (
            "f.size(0) > 2",
            "f.shape[0] == 1",
            "f.shape[-1] > 3",
            "x.size(1) > 4",
            "x.numel() > 500",
            "x.is_contiguous()",
            "x.dtype == torch.float32",
            "len(f) == 2",
            "x.shape[1] % 2 == 0",
            "x.requires_grad",
            "torch.is_grad_enabled()",
            "f.stride(0) > 20",
            "self.training",
        )
    )
    draft.write("body", f"if {test}:\n    f = f * 3")
    return True


@twist
def number_of_size(draft: Draft) -> bool:
    """A number that is a size."""
    return pick(
        draft,
        "body",
        "f = f / x.size(1)",
        "f = f * x.size(0)",
        "f = f / math.sqrt(f.size(-1))",
        "f = f * (x.numel() // x.size(0))",
        "f = f + torch.arange(f.size(0)).view(-1, *[1] * (f.dim() - 1))",
        "f = f * torch.ones(x.size(0), *[1] * (f.dim() - 1))",
        "f = f * (t / x.size(1))",
        "f = f * torch.linspace(0, 1, x.size(1))[t]",
        "f = f * max(x.size(0), 2)",
        "f = f.sum(0, keepdim=True) / f.size(0) + f",
    )
