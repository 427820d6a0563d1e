"""The commands beside the server, a file or a folder each; what several of them use is a module here: :mod:`servers`,
:mod:`tables`, :mod:`plotting`, :mod:`published`.
"""
