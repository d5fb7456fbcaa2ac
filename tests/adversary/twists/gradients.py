"""Autograd and modes: parts without gradients, custom functions, norms, lazy layers."""

from ..draft import Draft
from .base import Twist, into, pick

TWISTS: list[Twist] = []
twist = into(TWISTS)


@twist
def autograd(draft: Draft) -> bool:
    """Parts without gradients, custom functions, checkpoints, hooks of tensors."""
    draft.say(
        "prelude",
        """
        class Reverse(torch.autograd.Function):
            @staticmethod
            def forward(ctx, v):
                ctx.save_for_backward(v)
                return v * 1
            @staticmethod
            def backward(ctx, g):
                return -0.5 * g
        class Straight(torch.autograd.Function):
            @staticmethod
            def forward(ctx, v):
                return v.view_as(v)
            @staticmethod
            def backward(ctx, g):
                return g * 3
        """,
    )
    size = draft.get("f").shape[-1]
    m = draft.name("part")
    draft.say("init", f"self.{m} = nn.Linear({size}, {size})")
    return pick(
        draft,
        "body",
        f"with torch.no_grad():\n    f = self.{m}(f)",
        f"f = self.{m}(f).detach()",
        f"f = self.{m}(f) + f.detach()",
        f"with torch.set_grad_enabled(t > 1):\n    f = self.{m}(f)",
        f"with torch.set_grad_enabled(self.training):\n    f = self.{m}(f)",
        f"f = Reverse.apply(self.{m}(f))",
        f"f = Straight.apply(self.{m}(f))",
        f"f = checkpoint(self.{m}, f, use_reentrant=True)",
        f"f = checkpoint(self.{m}, f, use_reentrant=False)",
        f"f = self.{m}(f)\nif f.requires_grad:\n    f.register_hook(lambda g: g * 0.5)",
        f"f = self.{m}(f)\nif f.requires_grad:\n    f.retain_grad()",
        f"f = self.{m}(f)\nf = f + (f.round() - f).detach()",
        f"with torch.enable_grad():\n    f = self.{m}(f)",
        f"with torch.inference_mode():\n    g2 = self.{m}(f)\nf = f + g2.clone()",
        f"f = torch.no_grad()(self.{m})(f)",
        f"with torch.enable_grad():\n    v = f.detach().requires_grad_()\n"
        f"    f = f + torch.autograd.grad(self.{m}(v).sum(), v)[0]",
        f"f = torch.vmap(self.{m})(f)",
        f"f = torch.func.jvp(self.{m}, (f,), (torch.ones_like(f),))[1]",
        f'with torch.autocast("cpu", torch.bfloat16):\n    f = self.{m}(f)\nf = f.float()',
        f"f = torch.utils.checkpoint.checkpoint_sequential([self.{m}], 1, f, use_reentrant=False)",
    )


@twist
def modes(draft: Draft) -> bool:
    """Train and eval mode of a part, and changes of it in the forward."""
    size = draft.get("f").shape[-1]
    if draft.get("f").dim() != 2:
        return False
    m = draft.name("norm")
    draft.say("init", f"self.{m} = nn.BatchNorm1d({size})")
    return pick(
        draft,
        "body",
        f"self.{m}.eval()\nf = self.{m}(f)",
        f"f = self.{m}(f)\nself.{m}.train(self.training)",
        f"f = F.batch_norm(f, self.{m}.running_mean, self.{m}.running_var, training=True)",
        "f = F.batch_norm(f, None, None, training=True)",
        f"self.{m}.eps = 0.1\nf = self.{m}(f)",
        f"self.{m}.momentum = 0.1 * t\nf = self.{m}(f)",
        f"self.{m}.running_mean.zero_()\nf = self.{m}(f)",
        f"f = (f - self.{m}.running_mean) / (self.{m}.running_var + 1).sqrt()",
    )


@twist
def lazy(draft: Draft) -> bool:
    """A layer whose sizes are found by the first call."""
    if not draft.chance(0.2):
        return False
    return draft.say("init", "self.lazy = nn.LazyLinear(3)") and draft.say(
        "body", "f = self.lazy(f)"
    )
