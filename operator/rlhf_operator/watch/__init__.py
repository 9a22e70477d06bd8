"""Watching, by kopf: it brings reconnects, bookmarks and lifecycle, and decides nothing."""
