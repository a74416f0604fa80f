"""From a recipe to a module that computes the loss: load -> quantized -> lora, with packed attention."""
