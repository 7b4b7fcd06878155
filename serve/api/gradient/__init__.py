"""The Gradient wire: adapters trained by synchronous calls, and completed with choices.
May import http, access, db, engine's types and api/openai's generation.
An adapter is seen in the workspace it was created in alone; one call is one update."""
