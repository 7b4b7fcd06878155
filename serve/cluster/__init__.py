"""Several servers behind one address: the front, the replicas and the keeper, and which of them answers a request.
May import serve/server and everything below it; only serve/cli imports it.
The router, the relay, the autoscaler and the reconciler are pure host code; only `ray_*` and `up` import ray."""
