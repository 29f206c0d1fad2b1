"""Pictures in, draws out: reading, the dynamic crop of Eq. 1, which draws a bank holds."""
