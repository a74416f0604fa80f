"""From a run to a model that serves: consolidate -> merge -> verify, and the model card."""
