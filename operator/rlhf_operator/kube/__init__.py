"""The only place that talks to the Kubernetes API: plain dicts in, plain dicts out."""
