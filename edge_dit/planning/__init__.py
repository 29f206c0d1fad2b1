"""From what a job asks for to what every later stage agrees on: job.toml and the plan."""
