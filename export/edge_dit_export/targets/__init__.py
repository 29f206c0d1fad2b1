"""One module a target that writes it, and what each needs to do so."""
