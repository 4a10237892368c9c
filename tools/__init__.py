"""Programs for developers, each run by itself; the package never imports them."""
