"""What a train step costs in matrix-multiply FLOPs: as compiled, and as the configuration says it should.

`program_cost` walks the optimised HLO of a compiled program and counts loops as often as they run. XLA's own
`cost_analysis` counts a loop's body once. `analytic_step_flops` counts the model's matmuls with k experts active.
A multiply and an add are two FLOPs. Elementwise work is not counted, nor a product with a vector that XLA turned
into multiply and reduce. What cannot be known is an error, never a guess.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import hlo
from moe_vlm_jax.models import placement

# Custom calls that multiply matrices, by what their target or traced name contains. A target that sounds like one
# but is not understood is an error; all others (sorting, buffers, tile tables) multiply nothing.
_MATMUL_CALL = re.compile(r"gemm|matmul|ragged-dot|ragged_dot|gmm")
_UNREADABLE_CALL = re.compile(r"conv|attention|fmha|flash|dot")
_KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2")  # hand-written kernels of any kind

_Cost = dict[tuple[str, str], float]  # (opcode, traced name) -> FLOPs


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """FLOPs of one run of a compiled program.

    Attributes:
      flops: all matmul FLOPs; of a conditional, those of its dearest branch (in hlo.RARELY the cheapest).
      by_kind: the same by 'dot', 'convolution', 'custom-call'.
      by_name: the same by name in the traced program, 'jit(step)/.../dot_general'.
      other_calls: custom calls taken to multiply nothing: target -> how many stand in the text.
    """

    flops: float
    by_kind: dict[str, float]
    by_name: dict[str, float]
    other_calls: dict[str, int]


def program_cost(hlo_text: str) -> ProgramCost:
    """Returns the cost of an optimised HLO module, `jax.jit(f).lower(...).compile().as_text()`.

    Raises:
      ValueError: a loop around a matmul whose trip count is not known at compile time, or an instruction that
        multiplies matrices in a way that the text does not tell.
    """
    computations, entry = hlo.parse(hlo_text)
    cost = _Walk(computations).computation(entry)
    by_kind: dict[str, float] = collections.defaultdict(float)
    by_name: dict[str, float] = collections.defaultdict(float)
    calls = collections.Counter()
    for (kind, name), flops in cost.items():
        by_kind[kind] += flops
        by_name[name] += flops
    for instruction in (i for computation in computations.values() for i in computation.values()):
        if instruction.opcode == "custom-call" and not _is_matmul_call(instruction):
            calls[_call_target(instruction)] += 1
    return ProgramCost(sum(by_kind.values()), dict(by_kind), dict(by_name), dict(calls))


def known_flops(hlo_text: str | None) -> tuple[float | None, str]:
    """Returns `program_cost(hlo_text).flops` and '', or None and the reason why the counter cannot tell."""
    if hlo_text is None:
        return None, "the backend does not show its programs"
    try:
        return program_cost(hlo_text).flops, ""
    except ValueError as error:
        return None, str(error)


class _Walk:
    """Costs of computations, each walked once."""

    def __init__(self, computations: dict[str, hlo.Computation]):
        self.computations = computations
        self.known: dict[str, _Cost] = {}

    def computation(self, name: str) -> _Cost:
        if name not in self.known:
            scope = self.computations[name]
            total: _Cost = collections.defaultdict(float)
            for instruction in scope.values():
                for key, flops in self._instruction(instruction, scope).items():
                    total[key] += flops
            self.known[name] = dict(total)
        return self.known[name]

    def _instruction(self, instruction: hlo.Instruction, scope: hlo.Computation) -> _Cost:
        key = (instruction.opcode, instruction.op_name)
        match instruction.opcode:
            case "dot":
                return {key: _dot_flops(instruction, scope)}
            case "convolution":
                return {key: _convolution_flops(instruction, scope)}
            case "custom-call":
                return {key: _matmul_call_flops(instruction, scope)} if _is_matmul_call(instruction) else {}
            case "while":
                body = self.computation(instruction.callee("body"))
                if not body:  # a loop without matmuls may run as often as its data say
                    return {}
                trips = hlo.trip_count(instruction, scope, self.computations)
                return {name: trips * flops for name, flops in body.items()}
            case "conditional":
                choose = min if instruction.rare else max
                return choose(map(self.computation, instruction.callees()), key=lambda cost: sum(cost.values()))
            case "fusion" | "call" | "async-start" | "fusion-start" | "call-start":  # -start: XLA:GPU's, goes on
                return self.computation(instruction.callees()[0])
            case opcode if opcode.endswith(("-update", "-done")):  # name the computation that -start called
                return {}
        if any(self.computation(callee) for callee in instruction.callees()):
            raise ValueError(
                f"{instruction.opcode} {instruction.name!r} calls a matmul; this counter does not know how often."
            )
        return {}


def _dot_flops(dot: hlo.Instruction, scope: hlo.Computation) -> float:
    lhs = hlo.dims(scope[dot.operands[0]].shape)
    return 2.0 * math.prod(hlo.dims(dot.shape)) * math.prod(lhs[i] for i in dot.integers("lhs_contracting_dims"))


def _convolution_flops(conv: hlo.Instruction, scope: hlo.Computation) -> float:
    """Returns the FLOPs of a convolution, counting only taps that fall on real input.

    XLA:TPU prints matmuls as convolutions. A batched one has its batch as a spatial dimension, dilated so that each
    position meets one tap on an element; the taps that fall into the holes cost nothing.
    """
    lhs, rhs = (hlo.dims(scope[name].shape) for name in conv.operands[:2])
    out = hlo.dims(conv.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", conv.attributes)
    if not labels:
        raise ValueError(f"convolution {conv.name!r} has no dim_labels; the HLO text has changed its layout.")
    lhs_labels, rhs_labels, out_labels = labels.groups()
    found = re.search(r"window=\{([^}]*)\}", conv.attributes)
    window = dict(item.split("=") for item in found.group(1).split()) if found else {}
    taps = 1
    for d in filter(str.isdigit, out_labels):

        def setting(name: str, default: int, d=d) -> int:
            # Of a padding low_high only the low side moves the taps.
            return int(window[name].split("x")[int(d)].split("_")[0]) if name in window else default

        taps *= _taps_on_input(
            input_size=lhs[lhs_labels.index(d)],
            kernel_size=rhs[rhs_labels.index(d)],
            output_size=out[out_labels.index(d)],
            stride=setting("stride", 1),
            pad=setting("pad", 0),
            input_dilation=setting("lhs_dilate", 1),
            kernel_dilation=setting("rhs_dilate", 1),
        )
    # The kernel's input features are those of one feature group already.
    flops = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")] * taps
    batch_groups = re.search(r"batch_group_count=(\d+)", conv.attributes)
    return flops / int(batch_groups.group(1)) if batch_groups else flops


def _taps_on_input(
    *,
    input_size: int,
    kernel_size: int,
    output_size: int,
    stride: int,
    pad: int,
    input_dilation: int,
    kernel_dilation: int,
) -> int:
    """Returns how many (output position, kernel tap) pairs of one dimension meet an input element."""
    span = (input_size - 1) * input_dilation + 1
    places = (o * stride - pad + k * kernel_dilation for o in range(output_size) for k in range(kernel_size))
    return sum(0 <= place < span and place % input_dilation == 0 for place in places)


def _call_target(call: hlo.Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    return found.group(1) if found else ""


def _is_matmul_call(call: hlo.Instruction) -> bool:
    """Whether a custom call multiplies matrices.

    Raises:
      ValueError: it is a kernel, or its target's name says that it does, but this counter does not know how.
    """
    target = _call_target(call).lower()
    # A Pallas kernel's own name is the instruction's; its traced name ends in 'pallas_call'.
    names = (target, call.name.lower(), call.op_name.rsplit("/", 1)[-1].lower())
    if any("metadata" in name for name in names):  # the tile table of a ragged matmul
        return False
    if any(_MATMUL_CALL.search(name) for name in names):
        return True
    if _UNREADABLE_CALL.search(target) or target in _KERNEL_TARGETS:
        raise ValueError(
            f"custom call {call.name!r} ({target}, {call.op_name}) may multiply matrices in a way that is not known "
            "here; teach cost._matmul_call_flops its shapes."
        )
    return False


def _matmul_call_flops(call: hlo.Instruction, scope: hlo.Computation) -> float:
    """Returns the FLOPs of a matmul custom call from its array shapes.

    Ragged: [M, K] x [E, K, N] -> [M, N], or [M, K] x [M, N] -> [E, K, N]: each row meets one expert, 2 M K N.
    Plain: [.., M, K] x [.., K, N] -> [.., M, N], either operand possibly transposed.
    """
    shapes = [hlo.dims(scope[name].shape) for name in call.operands if not scope[name].shape.startswith("(")]
    arrays, out = [dims for dims in shapes if len(dims) >= 2], hlo.dims(call.shape)
    if len(arrays) >= 2:
        lhs, rhs = arrays[:2]
        ranks = len(lhs), len(rhs), len(out)
        if ranks == (2, 3, 2):
            return 2.0 * math.prod(lhs) * out[1]
        if ranks == (2, 2, 3):  # M K * M N / (K N) = M^2
            rows = math.sqrt(math.prod(lhs) * math.prod(rhs) / math.prod(out[1:]))
            return 2.0 * rows * math.prod(out[1:])
        if len(set(ranks)) == 1:  # M K * K N * M N = (M K N)^2, whichever operand is transposed
            batch = math.prod(out[:-2])
            return 2.0 * batch * math.sqrt(math.prod(lhs) * math.prod(rhs) * math.prod(out) / batch**3)
    raise ValueError(f"cannot tell the FLOPs of custom call {call.op_name!r} with operands {arrays} and result {out}.")


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Matmul FLOPs of one train step by part: vision, projector, attention, mlp, router, experts, head, adapters."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())


def analytic_step_flops(
    config: config_lib.ModelConfig, *, num_rows: int, row_length: int, num_images: int, trainable: Sequence[str]
) -> StepFlops:
    """Returns what forward and backward must multiply, k experts active, nothing recomputed.

    Every slot of every row counts, padding too. Attention counts the full T x T square: neither the causal mask nor
    the tree mask saves work in a dense kernel. The head counts every slot. The backward of a matmul multiplies once
    for its weight, if that trains, and once for its input, if anything before it trains. Adapters count apart.

    Args:
      config: the model.
      num_rows: B rows of
      row_length: T slots.
      num_images: images in the batch.
      trainable: patterns over parameter paths, as in TrainingConfig.trainable.
    """
    count = _StepCount(trainable, config.lora)
    count.vision(config.vision, num_images)
    dec = config.decoder
    tokens = num_rows * row_length
    width, dims = config.vision.embed_dim, config.decoder.embed_dim
    layers = {"linear": 1, "identity": 0}.get(config.projector)
    layers = int(config.projector[3]) if layers is None else layers  # mlpNx_gelu
    for i in range(layers):
        count.matmul("projector", f"projector/linears/{i}", num_images * config.vision.num_tokens, width, dims)
        width = dims
    count.passed("decoder/embed")
    for g, group in enumerate(placement.group_layers(config.layer_experts)):
        for _ in range(group.repeats):
            for b, num_experts in enumerate(group.experts):
                count.block(config, f"decoder/groups/{g}/blocks/{b}", num_experts, num_rows, row_length)
    count.passed("decoder/final_norm")
    count.matmul("head", "decoder/embed" if dec.tie_embeddings else "decoder/lm_head", tokens, dims, dec.vocab_size)
    return StepFlops(dict(count.forward), dict(count.backward))


class _StepCount:
    """Adds matmuls in the order of the forward pass; `reached` says whether anything before trains."""

    def __init__(self, trainable: Sequence[str], lora: config_lib.LoraConfig):
        self.trainable = trainable
        self.lora = lora
        self.reached = False
        self.forward: dict[str, float] = collections.defaultdict(float)
        self.backward: dict[str, float] = collections.defaultdict(float)

    def trains(self, path: str, leaves: Sequence[str] = ("kernel", "bias", "scale", "embedding")) -> bool:
        names = [path, *(f"{path}/{leaf}" for leaf in leaves)]
        return any(re.fullmatch(pattern, name) for pattern in self.trainable for name in names)

    def adapts(self, path: str) -> bool:
        """Whether a layer has adapters that train."""
        adapted = self.lora.rank and any(re.fullmatch(pattern, path) for pattern in self.lora.targets)
        return bool(adapted) and self.trains(path, ("lora_a", "lora_b"))

    def passed(self, *paths: str) -> None:
        """Notes layers, or parameters that multiply no matrix: what comes after them has something to train before."""
        self.reached = self.reached or any(self.trains(path) or self.adapts(path) for path in paths)

    def matmul(self, part: str, path: str, rows: int, in_dim: int, out_dim: int) -> None:
        flops = 2.0 * rows * in_dim * out_dim
        self.forward[part] += flops
        self.backward[part] += flops * (int(self.reached) + int(self.trains(path, ("kernel", "embedding"))))
        if self.adapts(path):
            down, up = 2.0 * rows * in_dim * self.lora.rank, 2.0 * rows * self.lora.rank * out_dim
            self.forward["adapters"] += down + up
            self.backward["adapters"] += down * (1 + self.reached) + 2 * up
        self.passed(path)

    def attention(self, part: str, path: str, *, sequences: int, length: int, dim: int, heads: int, kv: int) -> None:
        rows, before = sequences * length, self.reached
        for name, out_dim in (("q", heads), ("k", kv), ("v", kv)):
            self.reached = before
            self.matmul(part, f"{path}/{name}", rows, dim, out_dim)
        self.reached = before
        self.passed(*(f"{path}/{name}" for name in "qkv"))
        scores = 2 * 2.0 * sequences * length**2 * heads  # q k^T and probs v
        self.forward[part] += scores
        self.backward[part] += 2 * scores * self.reached
        self.matmul(part, f"{path}/o", rows, heads, dim)

    def mlp(self, part: str, path: str, *, rows: int, dim: int, hidden: int, gated: bool) -> None:
        before = self.reached
        for name in ("up", "gate") if gated else ("up",):
            self.reached = before
            self.matmul(part, f"{path}/{name}", rows, dim, hidden)
        self.passed(f"{path}/up")
        self.matmul(part, f"{path}/down", rows, hidden, dim)

    def vision(self, config: config_lib.VisionConfig, num_images: int) -> None:
        if not num_images:
            return
        dim, length = config.embed_dim, config.num_patches + int(config.class_token)
        self.matmul("vision", "vision/patch_embed", num_images * config.num_patches, 3 * config.patch_size**2, dim)
        self.passed("vision/class_embed", "vision/position_embed", "vision/pre_norm")
        used = config.num_layers + 1 + config.select_layer if config.select_layer < 0 else config.select_layer
        path = "vision/blocks"
        for _ in range(used):
            self.passed(f"{path}/norm1")
            sizes = {"dim": dim, "heads": dim, "kv": dim}
            self.attention("vision", f"{path}/attention", sequences=num_images, length=length, **sizes)
            self.passed(f"{path}/norm2")
            self.mlp("vision", f"{path}/mlp", rows=num_images * length, dim=dim, hidden=config.mlp_dim, gated=False)

    def block(self, config: config_lib.ModelConfig, path: str, num_experts: int, num_rows: int, length: int) -> None:
        dec, tokens = config.decoder, num_rows * length
        self.passed(f"{path}/attention_norm")
        before = self.reached
        widths = {"dim": dec.embed_dim, "heads": dec.num_heads * dec.head_dim, "kv": dec.num_kv_heads * dec.head_dim}
        self.attention("attention", f"{path}/attention", sequences=num_rows, length=length, **widths)
        after_attention = self.reached
        if dec.parallel_block:
            self.reached = before
        self.passed(f"{path}/mlp_norm")
        sizes = {"dim": dec.embed_dim, "hidden": dec.mlp_dim, "gated": dec.gated_mlp}
        if num_experts:
            before = self.reached
            if config.moe.router == "cluster":  # a look-up
                self.passed(f"{path}/moe/router")
            else:
                self.matmul("router", f"{path}/moe/router", tokens, dec.embed_dim, num_experts)
            after_router = self.reached
            if config.moe.use_residual:
                self.reached = before
                self.matmul("mlp", f"{path}/moe/coefficient", tokens, dec.embed_dim, 2)
                self.mlp("mlp", f"{path}/moe/residual", rows=tokens, **sizes)
            after_residual = self.reached
            self.reached = before
            self.mlp("experts", f"{path}/moe/experts", rows=tokens * config.moe.top_k, **sizes)
            self.reached = self.reached or after_router or after_residual
        else:
            self.mlp("mlp", f"{path}/mlp", rows=tokens, **sizes)
        self.reached = self.reached or after_attention
