"""What every test shares: hypothesis without a clock and without chance, so that a failure repeats."""

from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
