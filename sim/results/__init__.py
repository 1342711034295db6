"""Records, metrics, reports and run folders."""
