"""Measures which blocks of a model may be skipped; docs/selection.md says how to use it."""
