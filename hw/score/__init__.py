"""What each block, precision and KV choice of a real model loses in quality."""
