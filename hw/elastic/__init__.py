"""A Hugging Face model that takes plans.

model             ``ElasticModel``, which most others import: applies plans and runs forward passes
blocks            MHA and FFN blocks whose weights can be freed, restored or quantized
quantize          weights in 8 and 4 bits; nested: half of the bits of a weight
ops               the operations of a pass: a Triton kernel on CUDA, plain PyTorch elsewhere
kernels           these kernels
copies            ``LayerCopier``: copies weights while iterations run
weight_streams    layers whose weights cross the link in every pass
kv                ``RequestKV``: one growing KV cache per request, simple and exact
forward           one forward pass over a batch, in this package's own code
paged_attention   ``PagedBatch``: one iteration over the paged pool, with one copy to the device
block_arrays      the block tables of an iteration as arrays
staging           pinned memory for that copy, and the one wait for the result
paged_kv          the memory behind the paged KV pool: one range of addresses
kv_storage        that memory as the storage of a KV pool; host_kv has host memory for what is swapped
quantized_kv      KV at 8 and 4 bits in the same KV blocks
compressed_kv     compressed KV of prompts in these KV blocks; kv_compression has the methods
virtual_memory    ranges of addresses that are mapped and unmapped in pieces
attention         ways to compute attention; attention_choice picks one, attention_packages has those of others
graphs            CUDA graphs of decode passes that recur
device            streams, copies, memory and graphs of a device: the seam that tests replace
device_memory     what a run allocates on the device
families          the module names of each supported model class
layers            the layers of a model: norms, and matrices that are one product each
rotation          rotary positions
random_weights    weights for any model description, without a download
checkpoint        ``load_checkpoint``: from a folder, a hub id or a package
"""
