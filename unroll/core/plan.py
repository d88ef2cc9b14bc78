"""The choices by which the mathematics of a layer is laid out in a graph."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from unroll.core.errors import Problem, UnrollError
from unroll.core.forms import FORMS
from unroll.core.presets import RULES, Situation

Gates = Literal["merged", "paired", "split"]

Directions = Literal["separate", "stacked"]

Layers = Literal["sequential", "wavefront"]

Products = Literal["matrix", "sums", "linear"]

Preset = Literal[
    "default",
    "onnxruntime",
    "inductor",
    "tensorrt",
    "tensorrt_rtx",
    "npu",
    "quantize",
    "openvino",
    "webgpu",
    "tract",
    "mnn",
    "opencv",
    "ncnn",
    "coreml",
    "webnn",
    "xnnpack",
]
"""The names of `PRESETS`; fields and values, `gates=paired,time=8`, are taken too, and are no type"""

Gradients = Literal["auto", "stepwise", "joined"]


@dataclass(frozen=True)
class Plan:
    """The choices that change the shape of the graph and none of its results.

    Args:
        gates: how many products a step makes with the hidden state: `merged` is one for all gates,
            `paired` one for the gates under a sigmoid and one for the candidate under a tanh,
            `split` one for each gate.
        directions: of a bidirectional layer: `separate` runs one and then the other, `stacked` both at once, with
            one batched product, in half as many serial steps.
        layers: `sequential` runs a layer over all steps before the next begins; `wavefront`, for layers in one
            direction, lets layer `l + 1` do step `t - 1` while layer `l` does step `t`, with one batched product:
            T + L - 1 serial steps in place of T * L.
        time: `explicit` writes every step; a number `k` writes `k` steps, a block, inside a loop that the target runs
            itself, for a graph whose size does not depend on the number of steps, which may stay open. An eager
            module runs its steps one by one in either case.
        products: with the hidden state: `matrix` is an operator of the target, `sums` a multiplication by each row of
            the weight and a sum, of which a compiler makes code of its own. For a batch of one: what does not compile
            it stores the weight as many times as the batch has rows. `linear` makes each product, with the input too,
            of the layer's own parameters as `nn.Linear` does, in torch's order of gates and with its own bias, and adds
            the one with the input after it: `nn.Linear` in modules, `F.linear` or `aten.linear` in graphs, `MatMul`
            and `Add` in ONNX files, as quantizers, adapters and converters look for. Merged gates alone, and without
            stacks or wavefronts, which cut or join weights.
        recompute: `nothing` keeps what each step computes for the backward pass; a number `k` keeps the states between
            blocks of `k` steps alone, and computes the steps of a block anew when gradients come to it, by
            `torch.utils.checkpoint`: long sequences are trained in less memory and more time. For modules, eager or
            compiled by `torch.compile`; what has no backward pass of its own, graphs, programs, traces and files, is
            refused. Without stacks, wavefronts and blocks of `time`.
        gradients: of the weights that steps multiply by, in modules, compiled or not: `stepwise` adds them up from step
            to step, a rounding each; `joined` keeps what each step gives the gates, and makes them of that by one
            product at the end, for more memory: less wrong in half precision. `auto` is `joined` in half precision
            where gradients are asked for, and `stepwise` else. Graphs, programs, TorchScript and files are stepwise.
        runtime: of an ONNX file: the runtime in whose form it is written, of `FORMS`, where the standard has several
            for one thing, such as `Split` and `Gather`. Other kinds of model have one form.

    The plan of a preset may depend on the layer, its steps and batch, the device and the kind of model; `resolve` says
    which one it is. It is asked when the steps are written, and by a module at each call, so that one module may run by
    several. What is not known by then meets no condition: open sizes in a program or a file, the batch in TorchScript,
    the device in a file. Of a graph with example inputs the batch is theirs. Frozen weights stay as the preset's own
    plan lays them out.

    In loops, and on the packed rows of an eager module, direction follows direction and layer follows layer; in
    TorchScript layer follows layer.

    Example:
        >>> print(Plan(gates="paired", time=16))
        gates=paired,time=16
    """

    gates: Gates = "merged"
    directions: Directions = "separate"
    layers: Layers = "sequential"
    time: Literal["explicit"] | int = "explicit"
    products: Products = "matrix"
    recompute: Literal["nothing"] | int = "nothing"
    gradients: Gradients = "auto"
    runtime: str = ""
    preset: str = field(default="", repr=False)
    """The name of the preset whose rules hold, see `RULES`; empty for most, which have none"""

    @staticmethod
    def of(plan: Plan | str | None) -> Plan:
        """Return the plan that an argument `plan=` stands for.

        Args:
            plan: a plan; the name of one of `PRESETS`; fields and values, `gates=paired,time=8`; or None for the
                default.

        Raises:
            UnrollError: if it is no plan.

        Example:
            >>> Plan.of("onnxruntime") == Plan.of("gates=paired") == Plan(gates="paired")
            True
        """
        if plan is None:
            return Plan()
        if isinstance(plan, str):
            return PRESETS.get(plan.strip()) or _read(plan)
        if not isinstance(plan, Plan):
            fix = f"give a Plan, such as Plan(gates='paired'), or the name of one: {', '.join(PRESETS)}"
            raise UnrollError(Problem(f"plan={plan!r}", f"is a {type(plan).__name__}", fix))
        return plan

    def resolve(self, at: Situation) -> Plan:
        """Return the plan for a layer: another one where a rule of the preset holds, and else this one.

        A choice that differs from the preset's own was made by hand, and stays.

        Example:
            >>> from unroll.core.recurrence import Recurrence
            >>> layer = Recurrence("LSTM", 8, 16)
            >>> [str(Plan.of("tensorrt").resolve(Situation(layer, steps, kind="onnx"))) for steps in (8, 200)]
            ['tensorrt', 'time=4']
        """
        for rule in RULES.get(self.preset, ()):
            if rule.holds(at):
                own = PRESETS[self.preset]
                settled = [name for name in rule.choices if getattr(self, name) != getattr(own, name)]
                settled += LAID_OUT if at.frozen else []
                return replace(self, preset="", **{k: v for k, v in rule.choices.items() if k not in settled})
        return self

    def __post_init__(self) -> None:
        problems: list[Problem] = []  # a plain one, as Dynamo reads this where a module asks the rules of a preset
        for choice, known in CHOSEN_FROM.items():
            if (given := getattr(self, choice)) not in known:
                fix = f"choose one of {', '.join(map(repr, known))}"
                problems.append(Problem(f"Plan({choice}=...)", f"got {given!r}", fix))
        if self.time != "explicit" and (type(self.time) is not int or self.time < 1):
            fix = "choose 'explicit', or the number of steps in a block, such as 16"
            problems.append(Problem("Plan(time=...)", f"got {self.time!r}", fix))
        if self.recompute != "nothing":
            if type(self.recompute) is not int or self.recompute < 1:
                fix = "choose 'nothing', or the number of steps in a block, such as 50"
                problems.append(Problem("Plan(recompute=...)", f"got {self.recompute!r}", fix))
            problems += self._misfits("recompute", directions="separate", layers="sequential", time="explicit")
        if self.products == "linear":
            problems += self._misfits("products", gates="merged", directions="separate", layers="sequential")
        if self.gradients == "joined":
            problems += self._misfits("gradients", layers="sequential", recompute="nothing")
            if self.products == "linear":
                finding = f"got 'linear' with gradients='joined', {REASONS['gradients']}"
                problems.append(Problem("Plan(products=...)", finding, "choose another, or gradients='stepwise'"))
        if problems:
            raise UnrollError(*problems)

    def _misfits(self, choice: str, **others: str) -> list[Problem]:
        """Return a problem for each of the other choices that a choice does not go with."""
        found = []
        for other, value in others.items():
            if (given := getattr(self, other)) != value:
                finding = f"got {given!r} with {choice}={getattr(self, choice)!r}, {REASONS[choice]}"
                default = next(f.default for f in fields(self) if f.name == choice)
                found.append(Problem(f"Plan({other}=...)", finding, f"choose {value!r}, or {choice}={default!r}"))
        return found

    def __str__(self) -> str:
        """Return the choices that are not the default's, as `of` reads them; of a preset with rules the name."""
        if self == PRESETS.get(self.preset):
            return self.preset
        chosen = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(chosen) or "default"

    def refuse_training(self, place: str) -> None:
        """Refuse to write a layer into a graph with choices about its backward pass, which only modules have.

        Raises:
            UnrollError: if there are any.

        Example:
            >>> Plan(gradients="joined").refuse_training("model.onnx")
            Traceback (most recent call last):
            unroll.UnrollError: model.onnx: cannot be written with gradients='joined', of the...
        """
        for choice in self.of_modules:
            finding = f"cannot be written with {choice}={getattr(self, choice)!r}, of the backward pass of a module"
            fix = f"train unroll(module, plan=...), compiled or not, or leave {choice} out"
            raise UnrollError(Problem(place, finding, fix))

    @property
    def of_modules(self) -> list[str]:
        """The choices about the backward pass that only modules honour."""
        chosen = {"recompute": self.recompute != "nothing", "gradients": self.gradients == "joined"}
        return [choice for choice, asked in chosen.items() if asked]

    @property
    def layout(self) -> str:
        """The way in which gates share products: `gates`, or `linear`."""
        return "linear" if self.products == "linear" else self.gates

    @property
    def block(self) -> int | None:
        """The number of steps in a block of a loop; None where every step is written."""
        return self.time if isinstance(self.time, int) else None


def _read(text: str) -> Plan:
    """Read a plan of fields and values, `gates=paired,time=8`."""
    known = [f.name for f in fields(Plan)]
    given: dict[str, Any] = {}
    for part in text.split(","):
        field, equals, value = map(str.strip, part.partition("="))
        if not equals or field not in known or field in given:
            close = difflib.get_close_matches(text, PRESETS, 1)
            fix = f"did you mean {close[0]}? " if close else ""
            fix += (
                f"give {', '.join(PRESETS)}, or fields and values, gates=paired,time=8; the fields: {', '.join(known)}"
            )
            raise UnrollError(Problem(f"plan={text!r}", "is no plan", fix))
        given[field] = int(value) if value.isdecimal() else value
    return Plan(**given)


REASONS = {
    "products": "whose weights are the layer's own, in one piece",
    "gradients": "of passes that run by themselves, once",
    "recompute": "which goes step by step, direction by direction and layer by layer",
}
"""The reasons why some choices do not go with others"""

CHOICES = {"gates": Gates, "directions": Directions, "layers": Layers, "products": Products}

LAID_OUT = list(CHOICES)
"""The choices that weights are laid out by"""

CHOSEN_FROM = {name: get_args(kind) for name, kind in {**CHOICES, "gradients": Gradients}.items()}
CHOSEN_FROM |= {"runtime": tuple(FORMS), "preset": ("", *RULES)}

# Reasons for each row; figures are for one layer, in one or two directions, of benchmarks/results/plans.json, see
# docs/benchmark.md; findings those of docs/contracts.md.
PRESETS: dict[str, Plan] = {
    "default": Plan(),
    # ONNX Runtime runs a product and the activation after it as one node, if that is applied to all of the product:
    # 0.89 to 0.97 of the time of `merged`.
    "onnxruntime": Plan(gates="paired"),
    # Inductor makes one fused kernel of what follows a product, so that the fewest products are the fastest: `paired`
    # takes 1.0 to 1.25, `split` 1.1 to 1.8 of the time. `products="sums"` takes 0.8 for a batch of one, and 1.3 for 16.
    # On a GPU, by the rules of core/presets.py, for a batch of one too.
    "inductor": Plan(gates="merged", preset="inductor"),
    # The fewest nodes a step, and in ONNX files of many steps blocks, by the rules of core/presets.py, for the time in
    # which TensorRT for RTX builds an engine, and its size. How fast engines run was not measured.
    "tensorrt": Plan(gates="merged", preset="tensorrt"),
    "tensorrt_rtx": Plan(gates="merged", preset="tensorrt_rtx"),
    # A product for each gate, to be quantized by itself. Not timed; keeps the rules of the target `npu`.
    "npu": Plan(gates="split", runtime="npu"),
    # What looks for nn.Linear finds all: of the digits' GRU PT2E's quantizers reach 19 of 19 products and not 1, see
    # examples/quantize.py; torchao, peft and Opacus all weights, see docs/training.md and tests/tools/.
    "quantize": Plan(products="linear"),
    # Not timed; these give right results for the eleven models of docs/runtimes.md, or for those named there.
    "openvino": Plan(),
    "webgpu": Plan(runtime="webgpu"),
    "tract": Plan(runtime="tract"),
    "mnn": Plan(runtime="mnn"),
    "opencv": Plan(runtime="opencv"),
    "ncnn": Plan(runtime="ncnn"),
    # Programs are converted; what comes of them runs on Apple's machines, and was not run.
    "coreml": Plan(),
    # Of programs: XNNPACK takes all products of explicit steps, and of `default` none, see docs/runtimes.md.
    "xnnpack": Plan(products="linear"),
    # By the table of docs/contracts.md alone, and not run: all is offered.
    "webnn": Plan(runtime="webnn"),
}
"""Plans for targets, by the target's name"""
