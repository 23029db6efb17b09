"""Models under one budget: train, evaluate, report (``fairseq-sha compare``).

``recipe`` turns a config and a budget into commands, ``runner`` runs them, ``logs`` reads what they
leave, and ``summary`` makes tables and pictures of it. Commands run in processes of their own, so
that nothing here imports fairseq or torch.
"""

DEFAULT_TRIALS = 16
