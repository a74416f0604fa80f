"""What a run needs of memory and time, from its recipe and the model's shape alone. Imports no torch."""
