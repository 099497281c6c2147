"""The commands of raycomplete, one file each."""
