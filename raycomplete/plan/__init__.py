"""A run on paper: memory, devices, speed and cost from model shapes and hardware; imports neither torch nor ray."""
