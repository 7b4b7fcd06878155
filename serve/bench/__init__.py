"""What `jaxlora bench` measures of a server or of whole steps; nothing of the server imports it.
client, load, popularity and report are a load generator for any OpenAI-compatible server, of the standard library only, so that
it leaves a shared machine's cores to the server; `bench serve`, `bench quantum` and benchmarks/ drive it.  roofline times the
engine's and the trainer's steps."""
