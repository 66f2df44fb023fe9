"""Compiles every launch of every kernel for an H100, without a GPU, and prints what came of it.

Started by test_compile.py in a process where the interpreter is off. The launches are recorded, not
run: the kernels' own launchers say which configurations ship.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, os.getcwd())
from fastllm.kernels import _triton
from fastllm.kernels._spec import kernels

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
         torch.int32: "i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
launches = []


def record(self, *args, grid, warmup, **kwargs):
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))


def source(function, arguments):
    """The specialisation that a launch with these arguments gets."""
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature=signature, constexprs=constants, attrs=hints)


def facts(function, arguments, options):
    compiled = triton.compile(source(function, arguments), target=GPUTarget("cuda", 90, 32),
                              options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return {"registers": int(found[1]), "stack": int(found[2]),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
            "fp64": len(re.findall(r"\bD(?:ADD|MUL|FMA)\b", code)),
            "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E\S*\.128", code))}


def main():
    JITFunction.run = record
    _triton.why_not = lambda device: ""
    done = set()
    for kernel in kernels():
        for shape in kernel.audit_shapes:
            last = list(kernel.variants.values())[-1:] if shape == kernel.audit_shapes[0] else []
            for options in ({}, *last):
                call = kernel.inputs(shape, torch.bfloat16, "cpu",
                                     torch.Generator().manual_seed(0), **options)
                outputs = [x for x in kernel.results(kernel.public, call) if x.requires_grad]
                if outputs:
                    torch.autograd.grad(outputs, call.differentiated(),
                                        [torch.ones_like(x) for x in outputs])
                while launches:
                    function, arguments, config = launches.pop()
                    key = source(function, arguments).hash() + str(config)
                    if key not in done:
                        done.add(key)
                        print(json.dumps({"kernel": kernel.name, "shape": shape,
                                          "function": function.__name__, **config,
                                          **facts(function, arguments, config)}), flush=True)


if __name__ == "__main__":
    main()
