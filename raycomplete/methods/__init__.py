"""Training methods, one file each: which rows a step trains, in which teacher context, by which loss terms."""
