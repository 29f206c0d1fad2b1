"""What training takes - memory, storage, time - and the best plan that fits a budget.

limits      what a device has to spare
cost        parameters, bytes and operations of one step, from shapes
footprint   memory, storage and time on a device, by target and layout
search      the best plan within a budget
"""
