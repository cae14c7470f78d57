"""What a network has learned, as arrays: filters, activations, exciting pictures, Grad-CAM. Draws nothing."""
