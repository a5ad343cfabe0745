"""How the embedded pair of policies is made, and how often the learning test is right."""
