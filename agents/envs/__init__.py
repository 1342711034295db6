"""The Gymnasium environments PruneToBudget-v0, ServeTrace-v0, ServeCluster-v0 and ServeRoles-v0.

registration                        registers all four
prune, serve, cluster, roles        the plain environments and their settings
prune_vector, serve_vector,
cluster_vector, roles_vector        the same episodes, many at a time, for training
prune_loads, serve_windows          which loads and windows each split may use
reward                              rewards as pure functions
surrogate                           the loss of many keep masks at once
checks                              actions and options of reset that callers pass
vector, render                      what the vector environments share; rendering
"""
