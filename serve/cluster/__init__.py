"""Many replicas behind one address: which of them answers a request.
May import serve/server and everything below it; only serve/cli imports it.
The router is pure host code: state and clock in, decision out."""
