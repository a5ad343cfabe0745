"""Short runs -> has GRPO learned, by what it gained."""
