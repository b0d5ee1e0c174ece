"""Discrete-event simulation of the engine:

its own scheduler against costs fitted to what its kernels measured.
"""

from engine.compiled import find_compiled

find_compiled(__name__, __path__)
