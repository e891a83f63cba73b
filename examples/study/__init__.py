"""The quality-diversity study; ``examples/run_study.py`` runs it."""
