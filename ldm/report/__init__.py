"""Presentation without any knowledge of the domain: pages, tables, plots and grids of tiles.

Everything here takes plain data (numbers, text, arrays, picture files), so that any part of the
project can use it; what is shown, and what it means, is decided by the caller.
"""
