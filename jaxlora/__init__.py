"""Base models, adapters and their files; the configuration of training and serving.

Imports pallas_kernels only; knows nothing of requests and jobs.
Folder imports go one way: core, config and storage, model, checkpoints, peft.
"""
