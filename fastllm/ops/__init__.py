"""The public face of every fused op: one function each, and what runs it.

Backends: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), "cpp" (CPU tensors, the
extension fastllm._C) and "reference" (plain torch, any device). "auto", the default, takes triton
for CUDA tensors and cpp for CPU tensors if it was built; where an op has no such implementation,
for float64 and for other devices it takes the reference. `dispatch` says what that comes to and
why. A backend asked for by name that cannot run raises; so does a CUDA tensor without Triton.
On CUDA, "auto" measures attention: ours beside torch's and flash-attn's (`_contest`).
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fastllm import cpu
from fastllm.kernels import adagrad as _adagrad
from fastllm.kernels import adamw as _adamw
from fastllm.kernels import attention as _attention
from fastllm.kernels import cross_entropy as _cross_entropy
from fastllm.kernels import dropout as _dropout
from fastllm.kernels import embedding as _embedding
from fastllm.kernels import geglu as _geglu
from fastllm.kernels import grad_norm as _grad_norm
from fastllm.kernels import jsd as _jsd
from fastllm.kernels import lamb as _lamb
from fastllm.kernels import layer_norm as _layer_norm
from fastllm.kernels import linear_cross_entropy as _linear_cross_entropy
from fastllm.kernels import linear_jsd as _linear_jsd
from fastllm.kernels import linear_logprobs as _linear_logprobs
from fastllm.kernels import lion as _lion
from fastllm.kernels import logprobs as _logprobs
from fastllm.kernels import lora as _lora
from fastllm.kernels import merge_attention as _merge_attention
from fastllm.kernels import muon as _muon
from fastllm.kernels import qk_norm_rope as _qk_norm_rope
from fastllm.kernels import quant as _quant
from fastllm.kernels import rms_norm as _rms_norm
from fastllm.kernels import rmsprop as _rmsprop
from fastllm.kernels import rope as _rope
from fastllm.kernels import sgd as _sgd
from fastllm.kernels import swiglu as _swiglu
from fastllm.kernels.quant import NF4, Int8, quantize_int8, quantize_nf4
from fastllm.ops import _contenders, _contest, _plain
from fastllm.ops._dispatch import (
    BACKENDS,
    TABLE,
    dispatch,
    face,
    pick,
    register,
    set_backend,
    use_backend,
)

__all__ = ["BACKENDS", "NF4", "OPS", "Int8", "dispatch", "quantize_int8", "quantize_nf4",
           "set_backend", "use_backend"]  # and every op

# ------------------------------------------------------------- ops with a kernel, alphabetically

adagrad_step = face(_adagrad.adagrad_step, reference=_adagrad.reference)
adamw_step = face(_adamw.adamw_step, cpp=cpu.adamw_step,
                  cpp_lacks=("exp_avg_scales", "exp_avg_sq_scales"), reference=_adamw.reference)
attention = face(_attention.attention, triton=_contenders.triton, cpp=cpu.attention,
                 reference=_plain.attention, measured=_contest.attention,
                 summary=_contest.summary)
cross_entropy = face(_cross_entropy.cross_entropy, cpp=cpu.cross_entropy,
                     cpp_lacks=("weight", "logit_scale", "return_metrics"),
                     reference=_cross_entropy.reference)
dequantize = face(_quant.dequantize, reference=_quant.dequantize_reference)
dropout = face(_dropout.dropout, reference=_dropout.reference)
embedding = face(_embedding.embedding, reference=_embedding.reference)
geglu = face(_geglu.geglu, reference=_geglu.reference)
geglu_linear = face(_geglu.geglu_linear, reference=_geglu.reference_linear)
grad_norm = face(_grad_norm.grad_norm, cpp=cpu.grad_norm, reference=_grad_norm.reference)
int8_linear = face(_quant.int8_linear, reference=_quant.linear_reference)
jsd = face(_jsd.jsd, reference=_jsd.reference)
kl_div = face(_jsd.kl_div, reference=_jsd.kl_reference)
lamb_step = face(_lamb.lamb_step, reference=_lamb.reference)
layer_norm = face(_layer_norm.layer_norm, reference=_layer_norm.reference)
linear_cross_entropy = face(
    _linear_cross_entropy.linear_cross_entropy,
    cpp=partial(_linear_cross_entropy.linear_cross_entropy, parts="cpp"),
    cpp_lacks=("ce_weight", "logit_scale", "return_metrics"),
    reference=partial(_linear_cross_entropy.linear_cross_entropy, parts="torch"))
linear_jsd = face(_linear_jsd.linear_jsd, reference=_linear_jsd.plain)
linear_logprobs = face(_linear_logprobs.linear_logprobs, reference=_linear_logprobs.plain)
lion_step = face(_lion.lion_step, reference=_lion.reference)
logprobs = face(_logprobs.logprobs, reference=_logprobs.reference)
lora_linear = face(_lora.lora_linear, reference=_lora.reference)
merge_attention = face(_merge_attention.merge_attention, reference=_merge_attention.reference)
muon_step = face(_muon.muon_step, reference=_muon.reference)
nf4_linear = face(_quant.nf4_linear, reference=_quant.linear_reference)
qk_norm_rope = face(_qk_norm_rope.qk_norm_rope, cpp=cpu.qk_norm_rope,
                    cpp_lacks=("interleaved",), reference=_qk_norm_rope.reference)
rms_norm = face(_rms_norm.rms_norm, cpp=cpu.rms_norm, reference=_rms_norm.reference)
rmsprop_step = face(_rmsprop.rmsprop_step, reference=_rmsprop.reference)
rope = face(_rope.rope, cpp=cpu.rope, cpp_lacks=("interleaved",), reference=_rope.reference)
rope_tables = _rope.rope_tables  # plain torch on any device
sgd_step = face(_sgd.sgd_step, reference=_sgd.reference)
swiglu = face(_swiglu.swiglu, cpp=cpu.swiglu, reference=_swiglu.reference)
swiglu_linear = face(_swiglu.swiglu_linear, cpp=cpu.swiglu_linear,
                     reference=_swiglu.reference_linear)

# ------------------------------------------------------------------- ops without one, as yet


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) @ weight (O, I).T + bias, by the fastest exact product of the device."""
    return pick(_linear, (x,), {})(x, weight, bias)


# The fast float32 product comes from torch itself and needs no extension.
_linear = register(linear, cpp=cpu.linear, reference=F.linear, compiled=False,
                   on_cuda="the vendor's matrix product")
OPS = tuple(TABLE)
