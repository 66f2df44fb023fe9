"""Fused Triton kernels, one op a file; installed as fastllm.kernels. Nothing runs or registers on this import."""
