"""Discrete-event simulation of the engine:

its own scheduler against costs fitted to what its kernels measured.
"""
