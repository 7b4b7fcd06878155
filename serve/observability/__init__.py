"""Logs, Prometheus metrics and traces of what the app and the device thread leave to be read.
May import http, runtime and access; the only files with structlog and OpenTelemetry.
Names of adapters are in metrics only when asked for; nothing here may slow the device thread."""
