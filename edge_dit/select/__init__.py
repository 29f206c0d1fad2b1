"""Which blocks may be skipped: measured on tuned models (docs/method.md)."""
