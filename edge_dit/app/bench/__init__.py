"""`edge-dit bench`: speed and memory, on public configurations with random weights.

bench     every target against torch eager
loop      the loop's stages on the device; loop_tasks runs them
child     what both run in child processes
model     the model that is measured
machine   the machine, and its load
"""
