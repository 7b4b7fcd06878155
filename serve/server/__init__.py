"""The app joined: gate, routers, uvicorn with draining, and settings to a running server.
May import everything of serve but cli and demo.
build is the only composition root; the gate (id, Host, caller, limits) stands around every route."""
