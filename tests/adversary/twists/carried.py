"""State that a frame hands on: sums, recurrent cells, the frame before, memories."""

import torch

from ..draft import Draft
from .base import Twist, into

TWISTS: list[Twist] = []
twist = into(TWISTS)


@twist
def carried(draft: Draft) -> bool:
    """State that a frame hands on to the next."""
    start = draft.rng.choice(
        ("h = 0", "h = 0.0", "h = torch.zeros(())", "h = None", "h = torch.zeros(1)")
    )
    draft.write("before", start)
    draft.scope["h"] = torch.zeros_like(draft.get("f"))
    if "None" in start:
        draft.write("body", "if h is None:\n    h = torch.zeros_like(f)")
    step = draft.rng.choice(
        (
            "h = h + f",
            "h = 0.5 * h + f",
            "h = torch.tanh(h + f)",
            "h = f - h",
            "h = h * 0.9 + f * 0.1",
            "h = f + h.detach() if t else f",
            "h = torch.maximum(f, h + f * 0)",
            "h = (h + f).relu()",
            "h = f",
            "h = f if t % 2 else h + f",
            "h = h + f.mean()",
            "h = h + 1",
        )
    )
    use = draft.rng.choice(("f = f + h", "f = h", "f = f * h", "f = h + 0"))
    lines = [step, use] if draft.chance(0.7) else [use, step]
    if draft.chance(0.3):
        lines = [f"if t % {draft.rng.choice((2, 3))} == 0:", *("    " + line for line in lines)]
    kept = draft.get("f")
    if not draft.say("body", "\n".join(lines)):
        return False
    draft.scope["f"] = draft.get("f") if draft.fits("f") else kept
    return True


@twist
def recurrent_cell(draft: Draft) -> bool:
    """An LSTMCell, a GRUCell or an RNNCell over the frames."""
    value = draft.get("f")
    if value.dim() != 2 and not draft.say("body", "f = f.flatten(1)"):
        return False
    value = draft.get("f")
    if value.dim() != 2 or value.size(1) > 64 or value.size(0) != 2:
        return False
    n = draft.rng.choice((3, 4))
    kind = draft.rng.choice(("LSTMCell", "GRUCell", "RNNCell"))
    bias = ", bias=False" * draft.chance(0.2)
    if not draft.say("init", f"self.cell = nn.{kind}({value.size(1)}, {n}{bias})"):
        return False
    start = draft.rng.choice((f"hc = x.new_zeros(f.size(0), {n})", "hc = None"))
    if kind == "LSTMCell":
        start = draft.rng.choice(
            ("hc = None", f"hc = (x.new_zeros(f.size(0), {n}), x.new_zeros(f.size(0), {n}))")
        )
    if "None" in start or draft.chance(0.3):
        draft.write("before", "hc = None")
    else:
        draft.write("before", "hc = None")
        draft.write("body", f"if hc is None:\n    {start}")
    draft.scope["hc"] = None
    pick = "[0]" if kind == "LSTMCell" else ""
    between = ""
    if draft.chance(0.25):
        between = draft.rng.choice(
            (
                "hc = hc if t % 2 else hc",
                "hc = tuple(v * 0.5 for v in hc)" if pick else "hc = hc * 0.5",
                "hc = tuple(v.detach() for v in hc)" if pick else "hc = hc.detach()",
                "hc = None if t == 2 else hc",
            )
        )
    call = "hc = self.cell(f, hc)"
    if draft.chance(0.15):
        call = "if t % 2 == 0 or hc is None:\n    hc = self.cell(f, hc)"
    text = f"{call}\n{between}\nf = hc{pick} if hc is not None else f[:, :{n}]"
    return draft.say("body", text)


@twist
def conv_lstm(draft: Draft) -> bool:
    """A convolution of the frame and the state."""
    value = draft.get("f")
    if value.dim() != 4:
        return False
    c, n = value.size(1), 3
    draft.say("init", f"self.gate = nn.Conv2d({c + n}, {2 * n}, 3, padding=1)")
    draft.write("before", "s = None")
    draft.scope["s"] = None
    order = draft.rng.choice(("[f, s]", "[s, f]", "(f, s)"))
    return draft.say(
        "body",
        f"""
        if s is None:
            s = f.new_zeros(f.size(0), {n}, f.size(2), f.size(3))
        i, j = self.gate(torch.cat({order}, 1)).chunk(2, 1)
        s = torch.sigmoid(i) * s + torch.tanh(j)
        f = s
        """,
    )


@twist
def previous_frame(draft: Draft) -> bool:
    """What the frame before gave."""
    draft.write("before", "prev = None")
    draft.scope["prev"] = None
    use = draft.rng.choice(
        (
            "now = f\nif prev is not None:\n    f = f - prev\nprev = now",
            "if prev is None:\n    prev = f\nf = f + prev",
            "if prev is None:\n    prev = f * 0\nnow = f\nf = (f - prev).abs()\nprev = now",
            "f, prev = (f if prev is None else f * prev), f",
            "f, prev = (f if prev is None else torch.cat([f, prev], -1)[..., ::2]), f.detach()",
        )
    )
    return draft.say("body", use)


@twist
def memory(draft: Draft) -> bool:
    """A list or a deque of the last features."""
    start = draft.rng.choice(("mem = []", "mem = collections.deque(maxlen=3)"))
    draft.say("before", start)
    return draft.say(
        "body",
        "mem.append(f)\n"
        + draft.rng.choice(
            (
                "f = torch.stack(list(mem)[-3:]).mean(0)",
                "f = f + mem[0]",
                "f = f + mem[-2] if len(mem) > 1 else f",
                "f = sum(mem) / len(mem)",
                "f = f * (2 if len(mem) > 4 else 1)",
                "f = max(mem, key=len)",
                "if len(mem) > 2:\n    f = f + mem.pop()",
                "f = torch.cat(list(mem)[:1], 0)",
            )
        ),
    )


@twist
def running(draft: Draft) -> bool:
    """A running maximum, minimum or total beside the features."""
    draft.write("before", "best = None")
    draft.scope["best"] = draft.get("f")
    op = draft.rng.choice(
        (
            "torch.maximum(best, f)",
            "torch.min(best, f)",
            "best + f",
            "torch.fmax(f, best)",
            "best * f",
            "torch.where(best > f, best, f)",
            "torch.logaddexp(best, f)",
            "torch.cat([best, f])[:len(f)]",
        )
    )
    return draft.say("body", f"best = f if best is None else {op}\nf = f - best")
