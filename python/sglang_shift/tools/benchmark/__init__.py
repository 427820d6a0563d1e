"""``python -m sglang_shift.benchmark`` compares Shift Parallelism with its peers on one machine.

:mod:`workloads` says what is sent, and :mod:`contenders` to which servers. :mod:`client` sends it, :mod:`watch` reads
the servers' state meanwhile, and :mod:`records` keeps the results. :mod:`figures` computes numbers from the records,
:mod:`report` makes tables and :mod:`plots` makes pictures. :mod:`link` emulates a slower link between the ranks, at the
rate that :mod:`link_rate` derives. :mod:`campaign` runs all of this in order. :mod:`options` defines the command line,
and :mod:`environment` describes what the figures depend on. Modules that other tools also use are beside this folder:
servers, plotting and published figures.
"""
