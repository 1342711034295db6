"""A Hugging Face model that takes plans.

model             ``ElasticModel``, which most others import: applies plans and runs forward passes
blocks            MHA and FFN blocks whose weights can be freed, restored or quantized
quantize          weights in 8 and 4 bits
ops               the operations of a pass: a Triton kernel on CUDA, plain PyTorch elsewhere
kernels           these kernels
copies            ``LayerCopier``: copies weights while iterations run
kv                ``RequestKV``: one growing KV cache per request, simple and exact
paged_kv          the memory behind the paged KV pool
paged_attention   one iteration over the paged pool
device_memory     what a run allocates on the device
families          the module names of each supported model class
random_weights    weights for any model description, without a download
checkpoint        ``load_checkpoint``: from a folder, a hub id or a package
"""
