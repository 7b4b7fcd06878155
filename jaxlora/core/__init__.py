"""Types and errors that all packages share: AdapterRef, LoraSpec, ModelConfig, JaxLoraError.

Imports nothing else of this repository and no jax.
An AdapterRef (tenant, name, version) is immutable; each error class has an HTTP status and a code.
"""
