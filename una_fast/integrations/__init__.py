"""Adapters of the fused head to other trainers: no loss, no kernel, no algebra of its own.

A module per host; each imports its host, and nothing here is imported before it is asked for.
"""
