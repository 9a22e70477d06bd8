"""Experiment trackers: where figures go besides status and Prometheus. No torch; clients are imported when chosen."""
