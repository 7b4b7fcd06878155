"""Attention over KV pages for decode and prompt chunks.

May import attention besides pallas_kernels' own modules.
The kernels read pages in place; the layout of pages is the caller's (`page_format`) and must be kept.
"""
