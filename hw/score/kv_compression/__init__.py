"""What published ways to compress a prompt's KV lose on the real model at equal bytes (hw/elastic/kv_compression).

``variants`` lists what is compared, together with this project's own ways to hold less KV; ``continuation`` measures
the loss of what comes after; ``compare`` is the command, and ``page`` its page.
"""
