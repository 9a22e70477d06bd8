"""Writes what follows from the code: CRDs, chart files, RBAC and reference pages. Never edited by hand."""
