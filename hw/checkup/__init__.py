"""The check-up of a device: one command that runs everything that counts on it, each step within a time limit.

run             the command: which steps, how long each may take, what is written
schedule        the steps in order, and their shares of the time
child           runs one step in a process of its own, and ends it at its limit
findings        what a step finds: figures and checks, saved at once
setup           what a step works with: device, model, sizes, folders
machine         describes the machine: device, driver, versions
figure          the graph of a check-up
environment, own_tests, weights, budgets, calibration, policies, simulation, serving, peers, kernels: one step each
wheels          fetches the packages that a machine with only torch lacks
"""
