"""Triton kernels, one module an operation's module; importing one registers its operations with torch.library.

Imported by :func:`textok_fast.ops.library.load_triton` only, so that nothing else needs Triton.
"""
