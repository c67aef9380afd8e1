"""What a GPU gives against what the CPU gives: marked ``gpu``, run by ``make gpu``."""
