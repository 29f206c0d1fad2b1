"""From job.toml, what a user asks for, to the plan that every later stage reads."""
