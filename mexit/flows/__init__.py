"""One file a command: compose the stages, return a frozen result. Also the Python API of each command.

Flows print nothing; they tell a `progress.Progress` what they do.
"""
