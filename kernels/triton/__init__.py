"""Kernels for NVIDIA GPUs, in Triton. One file each; nothing here is imported unless a GPU is used.

Every function has the signature and meaning of its twin in plain torch, and refuses on the host what the
kernel does not take (``kernels.errors.UnsupportedError``). None waits for the device, and all sizes that
change from step to step are read there, so that whole steps can be captured as graphs. Every kernel can be
launched before the one before it has ended (``kernels.triton.pdl``), and then waits for that.
"""
