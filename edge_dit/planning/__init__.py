"""From job.toml, what a user asks for, to the plan that every later stage reads.

job         job.toml, read and checked
make        a job -> its plan
plan        plan.json: which blocks train, and at which sizes
split       which blocks are skipped
selection   the measurement of which blocks may be skipped, and its file
"""
