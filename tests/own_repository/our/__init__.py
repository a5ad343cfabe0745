"""A team's own data and rewards."""
