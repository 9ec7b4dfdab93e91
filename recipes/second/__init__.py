"""A second, tiny model of another architecture by mini's recipe: so that what is measured is not of one model alone."""
