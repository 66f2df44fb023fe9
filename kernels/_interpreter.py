"""Mends for Triton's interpreter (3.6 to 3.9), installed by `_triton` when it is on.

The interpreter stores bfloat16 as raw uint16 bits and lets numpy work on them as integers:
products, sums and dots are garbage, and casts from float32 truncate. Here such operands are
widened to float32, computed, and rounded to nearest even once, as the hardware does. Python
floats reach a kernel as float32 scalars, and a one-element array can be a loop bound. Accesses
outside of tensors are refused, see `_bounds`.
"""

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

from fastllm.kernels import _bounds

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits (uint16), to nearest, ties to even; every NaN becomes 0x7FC0."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    # Adding 0x7FFF plus the lowest kept bit carries exactly when nearest-even rounds up.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), upper)


def _is_bf16(handle: Any) -> bool:
    # A comparison's result keeps its operands' Triton type while its data is boolean.
    return (isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16
            and handle.data.dtype == np.uint16)


def _wide(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrowed(handle: Any) -> Any:
    if handle.data.dtype == np.bool_:
        return Handle(handle.data, tl.bfloat16)
    return Handle(narrow(handle.data), tl.bfloat16)


def _through_float32(stock: Any, operands: int) -> Any:
    """A builder method whose first `operands` arguments, and so its result, may be bfloat16."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handles = args[:operands]
        # np.where passes (condition, a, b): the last operand has the result's type.
        if not _is_bf16(handles[-1]):
            return stock(self, *args, **kwargs)
        return _narrowed(stock(self, *map(_wide, handles), *args[operands:], **kwargs))

    return method


def _mend_casts() -> None:
    stock_cast, stock_fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return source if _is_bf16(source) else Handle(
                narrow(source.data.astype(np.float32)), tl.bfloat16)
        return stock_cast(self, _wide(source), target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        kinds = {source.dtype.scalar, target.scalar}
        truncate = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if tl.bfloat16 in kinds and not truncate and min(k.primitive_bitwidth for k in kinds) == 16:
            return cast_impl(self, source, target)
        return stock_fp_to_fp(self, source, target, rounding_mode)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    # The named casts are bound through cast_impl at call time; 3.6 alone lacks this constant.
    if not hasattr(Builder, "get_bf16"):
        Builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value])), tl.bfloat16)


def _mend_arithmetic() -> None:
    for name, operands in (("binary_op", 2), ("unary_op", 1), ("ternary_op", 3), ("create_fma", 3),
                           ("create_rsqrt", 1), ("create_erf", 1)):
        setattr(Builder, name, _through_float32(getattr(Builder, name), operands))
    stock_dot, stock_sum = Builder.create_dot, interpreter.ReduceOps.sum

    def create_dot(self: Any, a: Any, b: Any, *rest: Any, **kwargs: Any) -> Any:
        return stock_dot(self, _wide(a), _wide(b), *rest, **kwargs)

    def reduce_sum(self: Any, operand: Any) -> Any:
        if not _is_bf16(operand.handle):
            return stock_sum(self, operand)
        total = np.sum(widen(operand.handle.data), axis=self.axis, keepdims=self.keep_dims)
        shape = list(np.shape(total))
        kind = tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16
        return tl.core.tensor(Handle(narrow(np.atleast_1d(total)), tl.bfloat16), kind)

    Builder.create_dot, interpreter.ReduceOps.sum = create_dot, reduce_sum


def _mend_launches() -> None:
    stock_convert, stock_patch = interpreter._implicit_cvt, interpreter._patch_lang_tensor
    stock_launch, stock_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def implicit_convert(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(Handle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return stock_convert(argument)

    def patch_lang_tensor(tensor: Any, *args: Any) -> Any:
        result = stock_patch(tensor, *args)
        # 3.6 calls int() on an array of shape (1,), which numpy >= 2.4 refuses.
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return result

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        # exp overflowing to infinity is ordinary in a kernel: a GPU does not warn of it either.
        with np.errstate(all="ignore"):
            return stock_launch(self, *args, **kwargs)

    def patch_language(function: Any) -> Any:
        # The language stays patched for all of a launch; the interpreter goes through it again at
        # every call of a device function, for a third of the time.
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return stock_language(function)

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch_language
    interpreter._implicit_cvt = implicit_convert
    interpreter._patch_lang_tensor = patch_lang_tensor


def install() -> None:
    """Apply every mend, once a process."""
    if getattr(Builder, "fastllm_mends", False):
        return
    Builder.fastllm_mends = True
    _mend_casts()
    _mend_arithmetic()
    _mend_launches()
    _bounds.install()
