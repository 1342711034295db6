"""How many requests per second a server can take: the highest rate at which SLO attainment stays above a target."""
