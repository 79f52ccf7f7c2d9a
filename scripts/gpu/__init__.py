"""Measurements on a borrowed GPU machine: a list of commands, each with its time, run side by side or alone.

`steps` reads the list (steps.toml), `order` says what begins when, `check` looks at a list before time is spent,
`running` starts and ends the processes, `keep` packs what they wrote, `queue` is the command line.
"""
