"""Random programs that loop over frames: a source of frames, a body, a join, and a few twists.

Most programs are plain, so that passes have something to do; the twists are what people do besides
(:mod:`tests.adversary.twists`). The same seed gives the same program.
"""

import random

import torch

from . import modules, ops, twists
from .case import Call, Case, Input, compiled, tensors
from .draft import Draft

_FRAMES = {  # the sizes of a frame behind the batch
    "image": (3, 4, 4),
    "vector": (4,),
    "tokens": (5, 4),
    "scalar": (),
}
_LAYOUTS = {
    4: ("v.transpose(-1, -2)", "v.transpose(-1, -2).contiguous().transpose(-1, -2)"),
    5: (
        "v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)",
        "v.transpose(0, 1).contiguous().transpose(0, 1)",
        "v.to(memory_format=torch.channels_last_3d)",
        "v[:, :1].expand_as(v)",
    ),
    3: ("v.transpose(0, 1).contiguous().transpose(0, 1)", "v.transpose(1, 2).contiguous().mT"),
}
_VALUES = ("torch.randn(shape)",) * 12 + (
    "torch.rand(shape)",
    "torch.randint(-2, 3, shape).float()",
    "torch.zeros(shape)",
    "torch.randn(shape) * 100",
    "torch.randn(shape).relu()",
)


def program(seed: int) -> Case:
    """The program of a seed."""
    for attempt in range(100):
        rng = random.Random(f"program {seed} {attempt}")
        torch.manual_seed(rng.randrange(2**31))
        draft = Draft(rng)
        case = _composed(draft, seed)
        if case is not None:
            return case
    raise AssertionError(f"no program for seed {seed}")


def _composed(draft: Draft, seed: int) -> Case | None:
    rng = draft.rng
    kind = rng.choice(("image",) * 5 + ("vector",) * 4 + ("tokens",) * 2 + ("scalar",))
    time = rng.choice((1, 1, 1, 1, 1, 0, 2))
    inner = _FRAMES[kind]
    if time == 2 and not inner:
        time = 1
    number = rng.choice((1, 1, 1, 2, 2, 3))
    ids = kind == "vector" and draft.chance(0.1)
    specs = []
    for index in range(number):
        frames = f"T{index}" if index else "T0"
        sizes: tuple[int | str, ...] = ("B", frames, *inner)
        if time == 0:
            sizes = (frames, "B", *inner)
        elif time == 2:
            sizes = ("B", inner[0], frames, *inner[1:])
        if ids:
            sizes = sizes[:2]
        values = rng.choice(_VALUES) if not ids else "torch.randint(0, 6, shape)"
        layout = ""
        if draft.chance(0.12):
            layout = rng.choice(_LAYOUTS.get(len(sizes), ("",)))
        grad = draft.chance(0.06) and not ids
        specs.append(Input("xyz"[index], sizes, time, values, layout, grad=grad))
    frames = (rng.choice((2, 3, 3, 3, 4, 4, 5, 6)),) * number
    if number > 1 and draft.chance(0.3):
        frames = tuple(rng.choice((3, 4, 5)) for _ in range(number))
    example = Call(batch=2, frames=frames, seed=0)
    draft.scope.update({"B": 2})
    for spec, value in zip(
        specs, tensors(Case("", "", "", tuple(specs), (), example), example), strict=True
    ):
        draft.scope[spec.name] = value
    header = _source(draft, specs, time, ids)
    if header is None:
        return None
    twisted = rng.choice((0, 0, 1, 1, 1, 2, 2, 3))
    chosen = [rng.choice(twists.ALL) for _ in range(twisted)]
    early = [twist for twist in chosen if draft.chance(0.5)]
    for twist in early:
        _apply(draft, twist)
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        _grow(draft)
    for twist in chosen:
        if twist not in early:
            _apply(draft, twist)
    if draft.chance(0.3):
        _grow(draft)
    if not draft.fits("f"):
        return None
    _join(draft)
    _finish(draft)
    case = _case(draft, seed, tuple(specs), header, example)
    try:
        compiled(case)
    except SyntaxError:  # two twists that do not fit together
        return None
    return case


def _apply(draft: Draft, twist: twists.Twist) -> None:
    kept = {name: list(lines) for name, lines in draft.parts.items()}
    scope = dict(draft.scope)
    if draft.fits("f") and twist(draft) is not False and draft.fits("f"):
        draft.features.append(twist.__name__)
        return
    draft.parts.update(kept)
    draft.scope = scope


def _grow(draft: Draft) -> None:
    """A layer or an op more."""
    for _ in range(8):
        if draft.chance(0.55):
            if modules.add(draft):
                return
        elif _op(draft):
            return


def _op(draft: Draft) -> bool:
    rng = draft.rng
    value = draft.get("f")
    others = ["f", "(f * 0.5)", "0.7", "f.flip(-1)", "f.detach()"]
    others += [spec for spec in ("g", "h") if isinstance(draft.get(spec), torch.Tensor)]
    call = ops.pick(rng, "f", others) if draft.chance(0.7) else _usual(rng)
    target = rng.choice(("f", "f", "f", "r"))
    statement = f"{target} = {call}"
    if "_(" in call and draft.chance(0.5):
        statement, target = call, "f"
    scope = dict(draft.scope)
    kept = list(draft.parts["body"])
    with torch.no_grad():  # as all that a draft says
        draft.scope["f"] = value.clone()
    fine = draft.say("body", statement)
    result = draft.get(target)
    if fine and isinstance(result, tuple | list) and len(result):
        fine = draft.say("body", f"{target} = {target}[{rng.randrange(len(result))}]")
        result = draft.get(target)
    if fine and isinstance(result, torch.Tensor) and not result.is_floating_point():
        real = ".real" if result.is_complex() else ".float()"
        fine = draft.say("body", f"{target} = {target}{real}")
        result = draft.get(target)
    if fine and isinstance(result, torch.Tensor) and target == "r":
        back = "f = f + r" if draft.chance(0.5) else "f = f * r.sum()"
        fine = draft.say("body", back) or draft.say("body", "f = f * r.mean()")
    elif fine and isinstance(result, torch.Tensor) and result.dim() == 0:
        fine = False
    if not fine or not draft.fits("f"):
        draft.parts["body"], draft.scope = kept, scope
        return False
    return True


def _usual(rng: random.Random) -> str:
    return rng.choice(
        (
            "f * 2",
            "f + 1",
            "f.relu()",
            "F.relu(f)",
            "f.mean(1)",
            "f.flatten(1)",
            "f.sum(-1)",
            "f.mean((-1, -2))",
            "f.view(f.size(0), -1)",
            "f.reshape(len(f), -1)",
            "f[:, :2]",
            "f.unsqueeze(1)",
            "f.transpose(1, -1)",
            "f.permute(*range(f.dim()))",
            "-f",
            "f ** 2",
            "f.amax(-1, keepdim=True)",
            "F.normalize(f, dim=1)",
            "f / f.norm()",
            "f - f.mean()",
            "f.softmax(1)",
            "f.max(1).values",
            "F.pad(f, (1, 0))",
            "f.roll(1, -1)",
            "f.flip(1)",
            "torch.where(f > 0, f, f * 0.1)",
            "f.clamp(min=0)",
            "F.dropout(f, 0.2, self.training)",
            "torch.einsum('b...,b...->b...', f, f)",
            "f @ f.mT",
            "f.chunk(2, 1)[0]",
            "f.cumsum(1)",
            "torch.cat([f, f], 1)",
            "f.sort(-1).values",
            "f.masked_fill(f < 0, 0.5)",
            "f.squeeze()",
            "f.gather(-1, f.argsort(-1))",
            "f.index_select(-1, torch.tensor([0, 0]))",
            "f[..., 0]",
            "f.topk(2, -1).values",
            "f[f.size(0) - 1]",
            "f.expand(3, *f.shape).mean(0)",
            "f.mT",
            "f.repeat_interleave(2, 1)",
            "f.std(1)",
            "f.narrow(-1, 0, 2)",
            "f.unfold(-1, 2, 1)",
            "f.mean(0, keepdim=True).expand_as(f)",
            "f[torch.arange(f.size(0)).flip(0)]",
            "F.layer_norm(f, f.shape[1:])",
            "f.split(1, 1)[-1]",
            "f.sum(dtype=torch.float64).float() * f",
        )
    )


def _source(draft: Draft, specs: list[Input], time: int, ids: bool) -> tuple[str, str] | None:
    """The header of the loop, and the expression of the number of frames."""
    rng = draft.rng
    at = ":, " * time
    x = specs[0].name
    size = f"{x}.size({time})" if draft.chance(0.7) else f"{x}.shape[{time}]"
    if time == 0 and draft.chance(0.5):
        size = f"len({x})"
    second = specs[1].name if len(specs) > 1 else None
    one = f"f = {x}[{at}t]"
    if draft.chance(0.1):
        one = f"f = {x}.select({time}, t)"
    elif draft.chance(0.08):
        one = f"f = {x}.narrow({time}, t, 1).squeeze({time})"
    elif draft.chance(0.1):
        one = f"f = {x}[{at}t:t + 1].squeeze({time})"
    loops = {
        f"for t in range({size}):": one,
        f"for t in range({size}): ": one,
        f"for t in range({size}):  ": one,
        f"for t in range({size} - 1, -1, -1):": one,
        f"for t in reversed(range({size})):": one,
        f"for t in range(0, {size}, 2):": one,
        f"for t in range({size} - 1):": f"f = {x}[{at}t] - {x}[{at}t + 1]",
        f"for t in range(1, {size}):": f"f = {x}[{at}t] + {x}[{at}t - 1]",
        f"for t in range({size}):   ": f"f = {x}[{at}-1 - t]",
        f"for t in range({size}):    ": f"f = {x}[{at}max(t - 1, 0):t + 1].mean({time})",
        f"for t in range({size} - 1): ": f"f = {x}[{at}t:t + 2].mean({time})",
        f"for t in range(0, {size} - 1, 2):": f"f = {x}[{at}t:t + 2].sum({time})",
        f"for t, f in enumerate({x}.unbind({time})):": "",
        f"for t, f in enumerate(torch.unbind({x}, {time})):": "",
        f"for t, f in enumerate({x}.split(1, {time})):": f"f = f.squeeze({time})",
        f"for t, f in enumerate({x}.chunk({size}, {time})):": f"f = f.squeeze({time})",
        f"for t, f in enumerate({x}.transpose(0, {time})):": "",
        f"for t in range(min({size}, 4)):": one,
        f"for t in range({size} // 2):": f"f = {x}[{at}2 * t]",
    }
    if second:
        other = rng.choice(("t", "t", f"min(t, {second}.size({time}) - 1)", "0", "-1"))
        pair = f"{one}; g = {second}[{at}{other}]"
        zipped = f"zip({x}.unbind({time}), {second}.unbind({time}))"
        loops = {
            f"for t in range({size}):": pair,
            f"for t in range({second}.size({time})):": pair,
            f"for t in range(min({size}, {second}.size({time}))):": pair,
            f"for t, (f, g) in enumerate({zipped}):": "",
            f"for t, (f, g) in enumerate({zipped}): ": "f = f + g",
            f"for t in range({size}): ": one,
            **(loops if draft.chance(0.2) else {}),
        }
    header, first = rng.choice(list(loops.items()))
    draft.scope.update({"t": 1})
    trial = first or f"f = {x}.select({time}, 1)"
    if second and "(f, g)" in header:
        trial = f"f = {x}.select({time}, 1); g = {second}.select({time}, 1); {first}"
    try:
        exec(trial, draft.scope)
    except Exception:
        return None
    if first:
        draft.write("body", first)
    if ids:
        draft.say("init", "self.emb = nn.Embedding(6, 4)")
        if not draft.say("body", "f = self.emb(f)"):
            return None
    if second and isinstance(draft.get("g"), torch.Tensor) and "g" in header + first:
        if ids:
            draft.say("body", "g = self.emb(g)")
        draft.say("body", rng.choice(("f = f + g", "f = torch.cat([f, g], -1)", "f = f * g")))
    return header.rstrip(), size


def _join(draft: Draft) -> None:
    """What becomes of the frames' results."""
    rng = draft.rng
    kinds = (
        ("outs = []", "outs.append(f)", "out = torch.stack(outs, {d})"),
        ("outs = []", "outs.append(f)", "out = torch.stack(outs, {d})"),
        ("outs = []", "outs.append(f)", "out = torch.stack(outs, {d})"),
        ("outs = []", "outs.append(f)", "out = torch.cat(outs, -1)"),
        ("outs = []", "outs.append(f.unsqueeze(0))", "out = torch.cat(outs)"),
        ("outs = []", "outs.append(f)", "out = sum(outs)"),
        ("outs = []", "outs.append(f)", "out = torch.stack(outs).mean(0)"),
        ("outs = []", "outs.append(f)", "out = torch.stack(outs).amax(0)"),
        ("outs = []", "outs.append(f)", "out = outs[-1]"),
        ("outs = []", "outs.append(f)", "out = outs"),
        ("outs = []", "outs.append(f)", "out = tuple(outs)"),
        ("outs = []", "outs.insert(0, f)", "out = torch.stack(outs, {d})"),
        ("outs = []", "outs += [f]", "out = torch.stack(outs[-3:], {d})"),
        ("outs = []", "outs += [f]", "out = torch.stack(outs[1:], {d})"),
        ("outs = []", "outs += [f]", "out = torch.stack(outs[::2] + outs[1::2], {d})"),
        ("outs = []", "outs += [f]", "out = torch.stack(outs, {d}) / (2 if len(outs) > 4 else 1)"),
        ("outs = []", "outs.append(f)", "out = torch.stack(sorted(outs, key=len), {d})"),
        (
            "outs = collections.deque(maxlen=3)",
            "outs.append(f)",
            "out = torch.stack(list(outs), {d})",
        ),
        ("outs = {{}}", 'outs[f"frame{{t}}"] = f', "out = outs"),
        ("outs = {{}}", "outs[t] = f", "out = [outs[k] for k in sorted(outs)]"),
        ("outs = []", "outs.append((f, f * 2))", "out = [torch.stack(o, {d}) for o in zip(*outs)]"),
        ("total = 0", "total = total + f", "out = total"),
        ("total = 0", "total += f", "out = total"),
        ("total = 0.5", "total = total * 0.9 + f", "out = total"),
        ("total = None", "total = f if total is None else total + f", "out = total"),
        ("total = None", "total = f if total is None else torch.maximum(total, f)", "out = total"),
        ("total = None", "total = f if total is None else torch.min(total, f)", "out = total"),
        (
            "total = None",
            "total = f if total is None else torch.cat([total, f], {d})",
            "out = total",
        ),
        ("total = None", "total = f if total is None else torch.cat([f, total])", "out = total"),
        ("total = None", "total = f if total is None else total.add_(f)", "out = total"),
        (
            "total = []",
            "total.append(f if not total else total[-1] + f)",
            "out = torch.stack(total, {d})",
        ),
        ("last = None", "last = f", "out = last"),
        ("outs = []", "outs.append(f.mean())", "out = torch.stack(outs)"),
        (
            "outs = []",
            "outs.append(f)",
            'out = {{"last": outs[-1], "all": torch.stack(outs, {d})}}',
        ),
        ("outs = []", "outs.append(f)", "out = (torch.stack(outs, {d}), None)"),
        ("outs = []", "outs.append(f)", "out = (torch.stack(outs), len(outs), outs[0].shape[0])"),
    )
    before, body, after = rng.choice(kinds)
    if draft.chance(0.08) and draft.get("f").dim() >= 1:
        draft.write("before", "out = None")
        draft.write(
            "body",
            """
            if out is None:
                out = f.new_zeros(f.size(0), SIZE, *f.shape[1:])
            out[:, t] = f
            """,
        )
        return
    if draft.get("f").dim() == 0:
        after = after.replace(", {d})", ")")
    d = rng.choice((0, 1, 1, 1, -1))
    draft.write("before", before.format())
    draft.write("body", body.format(t="{t}", d=d))
    draft.write("after", after.format(d=d))


def _finish(draft: Draft) -> None:
    """What follows the loop, and what is returned."""
    rng = draft.rng
    if draft.chance(0.15):
        draft.write("after", rng.choice(twists.ENDINGS))
    draft.write("after", "return out")


def _case(
    draft: Draft, seed: int, specs: tuple[Input, ...], header: tuple[str, str], example: Call
) -> Case:
    rng = draft.rng
    parts = draft.parts
    arguments = ", ".join(spec.name for spec in specs)
    pad = "    "
    lines = list(parts["prelude"])
    lines += ["class Net(nn.Module):", pad + "def __init__(self):", pad * 2 + "super().__init__()"]
    lines += [pad * 2 + line for line in parts["init"]]
    lines += [pad + f"def forward(self, {arguments}):"]
    lines += [pad * 2 + line for line in parts["before"]]
    lines += [pad * 2 + header[0]]
    lines += [pad * 3 + line.replace("SIZE", header[1]) for line in parts["body"]]
    lines += [pad * 2 + line for line in parts["after"]]
    source = "\n".join(lines) + "\n"
    modes = ("Net().eval()",) * 5 + ("Net()",) * 3 + ("Net().eval().requires_grad_(False)",)
    build = rng.choice(modes)
    dtype = rng.choice(("float32",) * 14 + ("float64", "bfloat16", "float16"))
    return Case(
        name=f"program{seed}",
        source=source,
        build=build,
        inputs=specs,
        calls=calls(rng, example, cheap=source.count("self.m") <= 4),
        example=example,
        given=not draft.chance(0.03),
        audited=draft.chance(0.12),
        threaded=draft.chance(0.02),
        dtype=dtype,
    )


def calls(rng: random.Random, example: Call, *, cheap: bool) -> tuple[Call, ...]:
    """The calls of both sides: the example's sizes first, then others."""
    frames = example.frames
    n = frames[0]
    made = [Call(2, frames, rng.choice(("parameters", "inputs", "inputs")), seed=1)]
    others = [
        Call(2, frames, "", "nan", seed=2),
        Call(2, frames, "inputs", "inf", seed=3),
        Call(3, frames, seed=4),
        Call(1, frames, "inputs", seed=5),
        Call(0, frames, seed=6),
        Call(2, tuple(f + 1 for f in frames), "inputs", seed=7),
        Call(2, (1,) * len(frames), seed=8),
        Call(2, (2,) * len(frames), "parameters", seed=9),
        Call(2, frames, "", seed=0),
        Call(3, tuple(f + 3 for f in frames), seed=10),
    ]
    if len(frames) > 1:
        others += [
            Call(2, (n + 2, *frames[1:]), seed=11),
            Call(2, (n, *(f + 2 for f in frames[1:])), "inputs", seed=12),
            Call(2, (n, *(f - 1 for f in frames[1:])), seed=13),
        ] * 2
    if cheap:
        others += [Call(1, (rng.choice((13, 45, 90)),) * len(frames), seed=14)] * 2
    if rng.random() < 0.1:
        others += [Call(2, frames, "parameters", mode=rng.choice(("train", "eval")), seed=15)] * 4
    picked = rng.sample(others, 4)
    return tuple(made + [call for i, call in enumerate(picked) if call not in picked[:i]])
