"""What a network has learned, as arrays: filters, activations, top activations and Grad-CAM. Draws nothing."""
