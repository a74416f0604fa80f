"""From a recipe to a module that computes the loss: load -> nf4 -> lora, with packed attention."""
