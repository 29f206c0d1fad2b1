"""What training takes - memory, storage, time - and the best plan that fits a budget."""
