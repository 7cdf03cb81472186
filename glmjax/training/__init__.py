"""How the model in the box is made."""
