"""How one step is computed on one or many processes, behind one seam: `base.Strategy`."""
