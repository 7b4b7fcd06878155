"""Base models, adapters and their files; the configuration of training and serving.

Imports pallas_kernels only, and knows no request and no job.
Folders point one way: core, config and storage, model, checkpoints, peft.
"""
