"""Adapters of the fused head to other trainers: no loss, no kernel, no algebra.

A module per host. Importing a module imports the host; importing the package imports no host.
"""
