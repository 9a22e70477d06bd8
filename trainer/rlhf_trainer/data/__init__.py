"""Feedback files into validated records, and records into reproducible batches."""
