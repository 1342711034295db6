"""Rules and solvers that learned policies imitate and are compared with.

prune   for PruneToBudget: orders, ratios, static masks, the exact knapsack
serve   for ServeTrace and ServeCluster: policies of conf/policy, queue limits, fixed plans, learned policies
"""
