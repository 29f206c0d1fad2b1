"""What the commands do; each module joins several folders below.

api             the Python API of the host
planner         a job -> its plan, within a budget if there is one
public_plan     cost and best plan of a public checkpoint
run             all stages of a job, from pictures to an adapter
quickstart      the same on a shipped sample, with pictures before and after
verify          compares every target with PyTorch
report          a plan as an HTML page
describe        plans, banks, bundles, runs and LoRAs in words
doctor          what is installed, and what is missing
bench           speed and memory of every target against torch eager
bench_child     what `edge-dit bench` runs in child processes
bench_machine   the machine of a benchmark, and its load
bench_model     the model of a benchmark
"""
