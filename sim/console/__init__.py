"""The ``rap`` command: every ``python -m`` command of the project under a short name.

    rap            the command line itself: dispatch, list of commands, version
    commands       which commands there are, read from conf/
    completion     what a shell may offer next: commands, groups, options, keys
    keys.json      groups and keys of each command, written by ``python -m sim.reference``

Completion answers at every press of a key, so nothing here imports a command before it runs.
"""
