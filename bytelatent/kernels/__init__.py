"""Triton kernels, each beside the plain PyTorch function that it must equal. Triton is imported only when one runs."""
