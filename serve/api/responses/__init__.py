"""OpenAI's Responses API: text and calls, whole or as events; nothing is stored.
May import api/openai for bodies and generation.
Items are built from the same deltas as chat; what needs stored conversations is refused by name."""
