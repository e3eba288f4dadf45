"""Kernels for NVIDIA GPUs, in Triton. One file each; nothing here is imported unless a GPU is used.

Every function has the signature and meaning of its twin in plain torch and checks on the host that it was
given what the kernel takes (``kernels.errors.UnsupportedError``). None waits for the device, and all sizes that
change from step to step are read there, so that whole steps can be captured as graphs.
"""
