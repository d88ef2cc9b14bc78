"""The choices by which the mathematics of a layer is laid out in a graph."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.forms import FORMS
from unroll.core.presets import RULES, Situation

Gates = Literal["merged", "paired", "split"]

Directions = Literal["separate", "stacked"]

Layers = Literal["sequential", "wavefront"]

Products = Literal["matrix", "sums", "linear"]


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
        runtime: of an ONNX file: the runtime in whose form it is written, of `FORMS`, where the standard has several
            for one thing, such as `Split` and `Gather`. Other kinds of model have one form.

    In ONNX files, the plan of a preset may depend on the layer and its sizes; `resolve` says which one it is.

    In loops, and on the packed rows of an eager module, direction follows direction and layer follows layer; in
    TorchScript layer follows layer.

    Example:
        >>> Plan(gates="paired")
        Plan(gates='paired', directions='separate', layers='sequential', time='explicit', products='matrix', runtime='')
    """

    gates: Gates = "merged"
    directions: Directions = "separate"
    layers: Layers = "sequential"
    time: Literal["explicit"] | int = "explicit"
    products: Products = "matrix"
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

        Example:
            >>> from unroll.core.recurrence import Recurrence
            >>> layer = Recurrence("LSTM", 8, 16)
            >>> [str(Plan.of("tensorrt").resolve(Situation(layer, steps))) for steps in (8, 200)]
            ['tensorrt', 'time=4']
        """
        rule = next((rule for rule in RULES.get(self.preset, ()) if rule.holds(at)), None)
        return self if rule is None else replace(self, preset="", **rule.choices)

    def __post_init__(self) -> None:
        problems = Problems()
        for choice, kind in CHOICES.items():
            given = getattr(self, choice)
            if given not in get_args(kind):
                choices = ", ".join(map(repr, get_args(kind)))
                problems.add(f"Plan({choice}=...)", f"got {given!r}", f"choose one of {choices}")
        if self.time != "explicit" and (type(self.time) is not int or self.time < 1):
            fix = "choose 'explicit', or the number of steps in a block, such as 16"
            problems.add("Plan(time=...)", f"got {self.time!r}", fix)
        if self.runtime not in FORMS:
            problems.add("Plan(runtime=...)", f"got {self.runtime!r}", f"choose one of {', '.join(map(repr, FORMS))}")
        if self.products == "linear":
            plain = {"gates": "merged", "directions": "separate", "layers": "sequential"}
            for choice, value in plain.items():
                if (given := getattr(self, choice)) != value:
                    finding = f"got {given!r} with products='linear', whose weights are the layer's own, in one piece"
                    problems.add(f"Plan({choice}=...)", finding, f"choose {value!r}, or products='matrix'")
        if self.preset and self.preset not in RULES:
            problems.add("Plan(preset=...)", f"got {self.preset!r}", f"choose one of {', '.join(map(repr, RULES))}")
        problems.check()

    def __str__(self) -> str:
        """Return the choices that are not the default's, as `of` reads them; of a preset with rules the name."""
        if self == PRESETS.get(self.preset):
            return self.preset
        chosen = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(chosen) or "default"

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
            fix = (
                f"give {', '.join(PRESETS)}, or fields and values, gates=paired,time=8; the fields: {', '.join(known)}"
            )
            raise UnrollError(Problem(f"plan={text!r}", "is no plan", fix))
        given[field] = int(value) if value.isdecimal() else value
    return Plan(**given)


CHOICES = {"gates": Gates, "directions": Directions, "layers": Layers, "products": Products}

# Reasons for each row; figures are for one layer, in one or two directions, of benchmarks/results/plans.json, see
# docs/benchmark.md; findings those of docs/contracts.md.
PRESETS = {
    "default": Plan(),
    # ONNX Runtime runs a product and the activation after it as one node, if that is applied to all of the product:
    # 0.89 to 0.97 of the time of `merged`.
    "onnxruntime": Plan(gates="paired"),
    # Inductor makes one fused kernel of what follows a product, so that the fewest products are the fastest: `paired`
    # takes 1.0 to 1.25, `split` 1.1 to 1.8 of the time. `products="sums"` takes 0.8 for a batch of one, and 1.3 for 16.
    "inductor": Plan(gates="merged"),
    # The fewest nodes a step, and in ONNX files of many steps blocks, by the rules of core/presets.py, for the time in
    # which TensorRT for RTX builds an engine, and its size. How fast engines run was not measured.
    "tensorrt": Plan(gates="merged", preset="tensorrt"),
    "tensorrt_rtx": Plan(gates="merged", preset="tensorrt_rtx"),
    # A product for each gate, to be quantized by itself. Not timed; keeps the rules of the target `npu`.
    "npu": Plan(gates="split", runtime="npu"),
    # Not timed; these give right results for the eleven models of docs/runtimes.md, or for those named there.
    "openvino": Plan(),
    "webgpu": Plan(runtime="webgpu"),
    "tract": Plan(runtime="tract"),
    "mnn": Plan(runtime="mnn"),
    "opencv": Plan(runtime="opencv"),
}
"""Plans for targets, by the target's name"""
