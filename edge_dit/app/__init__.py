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
claims          what a bundle says of itself, against its plan
verify_words    a certificate in words
bench/          speed and memory on public configurations
"""
