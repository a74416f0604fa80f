"""Ends a run when one of its processes dies, hangs or diverges, and names it. Read `watchdog.py` first."""
