"""Training with RLlib, imitation, cloning of a planner, and export to files that NumPy runs.

train, tune                commands: one training; a search over the keys of a training
clone, offline, export     commands: clone a planner; record episodes; export a policy
algorithms, modules        RLlib's algorithms and networks, with masked actions
imitate, demonstrations,
fitting, episodes          start from a solver, a plan, recorded episodes or a trained policy
validation                 the utility of a network on validation episodes
checkpoints, progress      what a training writes
on_ray                     Ray clusters
"""
