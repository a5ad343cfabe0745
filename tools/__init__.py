"""Tools that make and validate the product, and are not shipped with it."""
