"""Measurements: Vim against DeiT over the resolution, and the kernels one by one."""
