"""The Gymnasium environments PruneToBudget-v0, ServeTrace-v0 and ServeCluster-v0.

registration                        registers all three
prune, serve, cluster               the plain environments and their settings
prune_vector, serve_vector,
cluster_vector                      the same episodes, many at a time, for training
prune_loads, serve_windows          which loads and windows each split may use
reward                              rewards as pure functions
surrogate                           the loss of many keep masks at once
checks                              actions and options of reset that callers pass
vector, render                      what the vector environments share; rendering
"""
