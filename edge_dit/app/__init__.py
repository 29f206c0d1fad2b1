"""What the commands do: each module joins several floors below into one piece of work."""
