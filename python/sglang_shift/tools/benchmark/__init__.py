"""Shift Parallelism beside its peers on one machine: ``python -m sglang_shift.benchmark``.

:mod:`workloads` says what is sent, :mod:`contenders` to whom, :mod:`client` sends it, :mod:`watch` reads the servers'
state meanwhile, and :mod:`records` keeps what came of it; :mod:`figures` makes numbers of the records, :mod:`report`
tables and :mod:`plots` pictures. :mod:`link` emulates a slower link between the ranks, at the rate that
:mod:`link_rate` derives. :mod:`campaign` is the order of it all, :mod:`options` the command line, :mod:`environment`
what the figures depend on. What other tools use, too, is beside this folder: servers, plotting, published figures.
"""
