"""Numbers for people: evaluations, reports, charts."""
