"""Attention over KV pages for decode and prompt chunks.

May import attention besides pallas_kernels' top-level modules.
The kernels read pages in place; the caller defines the page layout (`page_format`), and it must be kept.
"""
