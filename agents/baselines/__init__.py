"""Rules and solvers that learned policies imitate and are compared with."""
