"""Options: GROUP/NAME.yaml. The entry point rap_lab.policies names this package."""
