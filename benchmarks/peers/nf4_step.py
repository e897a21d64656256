"""Worker of the NF4 benchmark: bitsandbytes.

`python -m benchmarks.peers.nf4_step matmul_4bit|dequantise_linear|float_linear|quantise|dequantise_DTYPE`
"""

import sys
from collections.abc import Callable

import torch
from bitsandbytes import functional
from bitsandbytes.autograd import _functions as autograd

from benchmarks import nf4_workload, pairing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, functional.QuantState]:
    return functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)


@torch.no_grad()
def main() -> None:
    task = sys.argv[1]
    torch.set_num_threads(1)
    weight, rows = map(torch.from_numpy, nf4_workload.make())
    packed, state = quantise(weight)
    linears: dict[str, Callable] = {
        "matmul_4bit": lambda: autograd.matmul_4bit(rows, packed, state),
        "dequantise_linear": lambda: torch.nn.functional.linear(rows, functional.dequantize_4bit(packed, state)),
    }
    product = linears["dequantise_linear" if task == "dequantise_linear" else "matmul_4bit"]()
    facts = nf4_workload.describe(
        codes=packed.numpy(), dense=functional.dequantize_4bit(packed, state).numpy(), product=product.numpy()
    )
    assert state.state2 is not None and state.offset is not None
    arrays = (packed, state.absmax, state.state2.absmax, state.offset)
    facts["bytes_per_weight"] = sum(array.numel() * array.element_size() for array in arrays) / weight.numel()
    state.dtype = DTYPES.get(task.removeprefix("dequantise_"), torch.float32)  # what is dequantised to
    runs = linears | {
        "float_linear": lambda: torch.nn.functional.linear(rows, weight),
        "quantise": lambda: quantise(weight),
        **{f"dequantise_{dtype}": lambda: functional.dequantize_4bit(packed, state) for dtype in DTYPES},
    }

    def step() -> float:
        with torch.no_grad():
            runs[task]()
        return 0.0

    pairing.serve(step, **facts)


if __name__ == "__main__":
    main()
