"""Flows: one file per command that composes the stages and returns a frozen result.

A flow prints nothing; it reports to a `core.progress.Progress`.
"""
