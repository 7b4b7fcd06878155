"""OpenAI's chat, completions and models, with vLLM's fields beside them; generation for every wire.
May import http, access, runtime, engine's types and jaxlora/checkpoints.
A Generation outlives its deltas; logprobs and tool calls are read from text in pieces."""
