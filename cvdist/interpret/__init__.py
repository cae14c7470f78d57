"""What a network has learned, as arrays: filters, activations, top activations, Grad-CAM. Draws nothing."""
