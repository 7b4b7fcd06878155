"""The types and errors that everything else speaks in: AdapterRef, LoraSpec, ModelConfig, JaxLoraError; how far a start is.
Imports nothing of ours and no jax.
An AdapterRef (tenant, name, version) is immutable; each error class has an HTTP status and a code."""
