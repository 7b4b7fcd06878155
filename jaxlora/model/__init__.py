"""The decoder, the pool of LoRA slots, the paged KV cache and the mesh: all that shapes device arrays.
May import core and pallas_kernels; decoder is the only file with Flax.
mesh holds the one table of logical axes; parameters() lists every array of a base, base_form how they lie. B is stored [R, out]."""
