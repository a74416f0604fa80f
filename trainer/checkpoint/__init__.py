"""Committed checkpoints: paths and manifest (`layout`), saving and restoring (`manager`)."""
