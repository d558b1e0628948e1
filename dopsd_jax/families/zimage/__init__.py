"""Z-Image-Turbo: everything that is true of this model alone; `family` is its `base.Family`."""
