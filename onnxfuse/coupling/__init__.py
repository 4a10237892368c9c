"""Which channels must change together: axes as expressions over atoms, rules as equations, one solver."""
