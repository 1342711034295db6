"""Triton kernels of the operations in ``hw.elastic.ops``. Only its modules import triton, so that it stays optional.

launch        the one place that starts a kernel, and counts
elementwise   norms, gated activations, rotation and storing of keys and values
attention     decode and prefill over the paged KV pool
quantized     products with weights of 8 and 4 bits
"""
