"""Labelled images by name, resized as each arm of the experiment sees them, in batches of numpy arrays."""
