"""Fused Triton kernels, one op a file; installed as fastllm.kernels. This import runs nothing."""
