"""How completions are drawn: requests in, samples out, in order. One file, one engine."""
