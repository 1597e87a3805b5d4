"""DETRDistill's losses, one file each, and the distiller that sums them up for a student."""
