"""What host and device agree on: bundle, bank, adapter, AdamW, certificate, and the targets."""
