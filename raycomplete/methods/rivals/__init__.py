"""Rival defences, one file each: methods that others published, as their papers and code describe them."""
