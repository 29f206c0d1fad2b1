"""What a loaded bundle can do (`trainer`), and one module a target and layout that does it."""
